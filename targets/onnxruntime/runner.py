"""Running an engine: one KV cache allocated once, bound as past and present alike, no copies per step."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.core.config import ModelConfig
from exporter.core.errors import InputError
from targets.base import Limits, RunOptions
from targets.cached_rows import CachedRows
from targets.onnxruntime.session import open_session

if TYPE_CHECKING:
    import onnxruntime as ort

# Prompts run in chunks, which bounds the memory of activations; from 128 to 512 they run equally fast.
CHUNK = 256
CACHE_TYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
Rows = tuple[int, int]  # first and behind last


class OnnxRuntimeRunner(CachedRows):
    """targets.base.Runner over one InferenceSession.

    The cache has one position more than the limit: a resting row computes there while others decode.
    """

    def __init__(self, model: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> None:
        super().__init__(config.vocab_size, limits, options)
        self._config = config
        self._hidden_names = (
            [f"layers.{i}.hidden" for i in range(config.num_layers + 1)] if options.hidden_states else []
        )
        self._session: ort.InferenceSession | None = open_session(model, options.threads, self._hidden_names)
        dtype = cache_type(self._session)
        shape = (self._batch, config.num_kv_heads, self._limit + 1, config.head_dim)
        self._cache = {
            f"{index}.{which}": np.zeros(shape, dtype)
            for index in range(config.num_layers)
            for which in ("key", "value")
        }
        self._logits = np.zeros((self._batch, 1, config.head_size), np.float32)
        self._bindings: dict[Rows, ort.IOBinding] = {}

    def close(self) -> None:
        """Free the session and the cache; the runner cannot be used afterwards."""
        self._bindings.clear()
        self._cache.clear()
        self._session = None

    def _append(self, ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Rows of one token take one step together, a fresh short batch too; the rest goes row by row in chunks,
        for GroupQueryAttention continues several tokens only in batches of one."""
        if self._session is None:
            raise InputError("run.closed", "the engine is closed", "open it again")
        self._begin_hidden(ids)
        width = int(valid.max(initial=0))
        if width == 1:
            return self._decode(ids[:, :1], valid)
        if width and self._batch > 1 and not self.lengths.any() and ids[:, :width].size <= CHUNK:
            return self._fresh_batch(ids[:, :width], valid)
        for row in range(self._batch):
            self._append_row(row, ids[row : row + 1, : valid[row]])
        return self._logits[:, 0].copy()

    def _append_row(self, row: int, ids: np.ndarray) -> None:
        for start in range(0, ids.shape[1], CHUNK):
            chunk = ids[:, start : start + CHUNK]
            total = int(self.lengths[row]) + chunk.shape[1]
            self._run((row, row + 1), chunk, np.ones((1, total), np.int64), start)
            self.lengths[row] = total

    def _fresh_batch(self, ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Ragged first prompts at once; an empty row computes one position that it does not keep."""
        mask = (np.arange(ids.shape[1]) < np.maximum(valid, 1)[:, None]).astype(np.int64)
        self._run((0, self._batch), ids, mask, 0)
        self.lengths[:] = valid
        for whole in self.hidden:
            whole[:, : ids.shape[1]][mask == 0] = 0.0  # what padding computes is not defined
        return self._logits[:, 0].copy()

    def _decode(self, ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """One token a row; a resting row computes one position behind its own, which it does not keep."""
        totals = self.lengths + 1
        mask = (np.arange(totals.max()) < totals[:, None]).astype(np.int64)
        self._run((0, self._batch), ids, mask, 0)
        self.lengths += valid
        return self._logits[:, 0].copy()

    def _run(self, rows: Rows, ids: np.ndarray, mask: np.ndarray, column: int) -> None:
        """One call of the engine for some rows; logits land in their place, hidden states from `column` on."""
        assert self._session is not None
        binding = self._binding(rows)
        ids, mask = np.ascontiguousarray(ids), np.ascontiguousarray(mask)
        for name, array in (("input_ids", ids), ("attention_mask", mask)):
            binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        outputs = [np.empty((*ids.shape, self._config.hidden_size), np.float32) for _ in self._hidden_names]
        for name, array in zip(self._hidden_names, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        for whole, part in zip(self.hidden, outputs, strict=False):
            whole[slice(*rows), column : column + ids.shape[1]] = part

    def _binding(self, rows: Rows) -> "ort.IOBinding":
        """Cache and logits of some rows, bound once: a row is contiguous, so its part is bound by pointer."""
        assert self._session is not None
        if rows not in self._bindings:
            binding = self._session.io_binding()
            for name, array in self._cache.items():
                part = array[slice(*rows)]
                binding.bind_input(f"past_key_values.{name}", "cpu", 0, array.dtype.type, part.shape, part.ctypes.data)
                binding.bind_output(f"present.{name}", "cpu", 0, array.dtype.type, part.shape, part.ctypes.data)
            logits = self._logits[slice(*rows)]
            binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
            self._bindings[rows] = binding
        return self._bindings[rows]

    def _begin_hidden(self, ids: np.ndarray) -> None:
        shape = (*ids.shape, self._config.hidden_size)
        self.hidden = [np.zeros(shape, np.float32) for _ in self._hidden_names]


def cache_type(session: "ort.InferenceSession") -> type[np.generic]:
    """numpy's type of an engine's keys and values."""
    found = next(value.type for value in session.get_inputs() if value.name.startswith("past_key_values."))
    return CACHE_TYPES[found]
