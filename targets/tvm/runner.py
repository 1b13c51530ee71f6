"""Running an engine: rows of any length become one list of tokens, and a step is one call into the library."""

from pathlib import Path
from typing import Any

import numpy as np

from exporter.core.config import ModelConfig
from exporter.core.errors import ArtifactError, InputError
from exporter.core.machine import physical_cores
from targets.base import Limits, RunOptions
from targets.cached_rows import CachedRows
from targets.tvm.cache import allocate_caches
from targets.tvm.engine_files import EngineIndex, check_profile, read_index
from targets.tvm.file_names import INDEX, LIBRARY, WEIGHTS
from targets.tvm.library import EngineLibrary, Function, import_ffi
from targets.tvm.step_buffers import RowPart, StepBuffers, cut_into_steps
from targets.tvm.weights import read_weights


class TvmRunner(CachedRows):
    """targets.base.Runner over the functions of an engine.so. Tokens of all active rows are computed together."""

    def __init__(self, engine_dir: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> None:
        super().__init__(config.vocab_size, limits, options)
        index = read_index(engine_dir)
        check_profile(index.profile)
        _check_config(index, config)
        self._index = index
        self._threads = options.threads or physical_cores()
        self._keep_hidden = options.hidden_states
        self._step: _Step | None = _Step(engine_dir, index, options.batch, self._limit, self._threads)

    def close(self) -> None:
        """Free weights, cache and library; the runner cannot be used afterwards."""
        self._step = None

    def _append(self, ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
        if self._step is None:
            raise InputError("run.closed", "the engine is closed", "open it again")
        rows = [
            RowPart(row, ids[row, :count], int(self.lengths[row]), True)
            for row, count in enumerate(valid.tolist())
            if count
        ]
        before = self.lengths.copy()
        self.hidden = self._hidden_arrays(ids.shape)
        logits = np.zeros((self._batch, self._index.head_size), np.float32)
        for parts in cut_into_steps(rows, self._index.chunk):
            states = self._step.run(parts, logits, self._keep_hidden)
            for part in parts:
                self.lengths[part.row] = part.past + len(part.ids)
            self._place(states, parts, before)
        return logits

    def _hidden_arrays(self, shape: tuple[int, ...]) -> list[np.ndarray]:
        count = self._index.num_layers + 1 if self._keep_hidden else 0
        return [np.zeros((*shape, self._index.hidden_size), np.float32) for _ in range(count)]

    def _place(self, states: list[np.ndarray], parts: list[RowPart], before: np.ndarray) -> None:
        """Hidden states [T, H] of a step to their rows and columns."""
        for whole, state in zip(self.hidden, states, strict=True):
            first = 0
            for part in parts:
                column = part.past - int(before[part.row])
                whole[part.row, column : column + len(part.ids)] = state[first : first + len(part.ids)]
                first += len(part.ids)


class _Step:
    """Library, weights and caches of an open engine. What it calls is converted once, whatever the depth."""

    def __init__(self, folder: Path, index: EngineIndex, batch: int, positions: int, threads: int) -> None:
        ffi = import_ffi()
        self._library, self._threads = EngineLibrary(folder / LIBRARY), threads
        weights = read_weights(folder / WEIGHTS, index, threads)
        tensors = {name: ffi.from_dlpack(array) for name, array in weights.items()}
        parts = [ffi.convert([tensors[name] for name in names]) for names in index.weight_names]
        caches = [
            ffi.convert([ffi.from_dlpack(array) for array in layer])
            for layer in allocate_caches(index, batch, positions)
        ]
        self._caches, self._weights = ffi.convert(caches), ffi.convert(parts)
        self._forward = self._library.function("forward")
        self._buffers = StepBuffers(index.chunk, batch, index.hidden_size, index.head_size, ffi.from_dlpack)
        self._functions = {name: self._library.function(name) for name in {"embed", "head", *index.layer_functions}}
        self._layers: list[tuple[Function, Any, Any]] = [
            (self._functions[name], cache, weight)
            for name, cache, weight in zip(index.layer_functions, caches, parts[1:-1], strict=True)
        ]

    def run(self, parts: list[RowPart], logits: np.ndarray, keep_hidden: bool) -> list[np.ndarray]:
        """Compute the tokens of some rows; logits of rows that end go to their row [B, V].

        -> the residual stream [T, H] around every layer with `keep_hidden`, else nothing.
        """
        tensors = self._buffers.fill(parts)
        self._library.use_threads(self._threads)
        states = []
        try:
            if keep_hidden:
                states = self._run_layer_by_layer(tensors, sum(len(part.ids) for part in parts))
            else:
                self._forward(*tensors, self._caches, self._weights)
        except (RuntimeError, TypeError, ValueError) as error:
            raise _refused(error) from error
        ended = [part.row for part in parts if part.last]
        logits[ended] = self._buffers.logits.array[: len(ended)]
        return states

    def _run_layer_by_layer(self, tensors: tuple[Any, ...], tokens: int) -> list[np.ndarray]:
        ids, positions, rows, segments, wanted, hidden, logits = tensors
        stream = self._buffers.hidden.array[:tokens]
        self._functions["embed"](ids, hidden, self._weights[0])
        states = [stream.copy()]
        for layer, cache, weights in self._layers:
            layer(hidden, positions, rows, segments, cache, weights)
            states.append(stream.copy())
        self._functions["head"](hidden, wanted, logits, self._weights[len(self._weights) - 1])
        return states


def _refused(error: Exception) -> ArtifactError:
    """The library looks at the type and shape of every tensor before a step."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ArtifactError(
        "tvm.call", f"{LIBRARY} refuses what {INDEX} describes: {lines[-1].strip()[-300:]}", "build the engine again"
    )


def _check_config(index: EngineIndex, config: ModelConfig) -> None:
    """The artifact's configuration and engine.json speak of one model."""
    for name in ("hidden_size", "num_layers", "num_kv_heads", "head_dim", "vocab_size", "head_size"):
        if getattr(index, name) != getattr(config, name):
            raise ArtifactError(
                "tvm.index",
                f"{INDEX} says {name} {getattr(index, name)}, the model's configuration {getattr(config, name)}",
                "the files are of different engines: build it again",
            )
