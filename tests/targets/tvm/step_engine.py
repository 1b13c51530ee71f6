"""An engine's VM functions called step by step, without the runner: arrays in, arrays out."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from targets.tvm.file_names import INDEX, LIBRARY, WEIGHTS
from targets.tvm.library import EngineLibrary, import_ffi

CACHE_TYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that start on a 64-byte boundary, as kernels expect."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def aligned_copy(values: Any, dtype: Any) -> np.ndarray:
    values = np.asarray(values, dtype)
    out = aligned(values.shape, dtype)
    out[...] = values
    return out


class StepEngine:
    """One engine with caches of `batch` rows of `capacity` positions. `lengths` are the rows' cached positions."""

    def __init__(self, path: Path, batch: int, capacity: int) -> None:
        self.index = json.loads((path / INDEX).read_text())
        self.library = EngineLibrary(path / LIBRARY)
        self.library.use_threads(1)
        self._dlpack = import_ffi().from_dlpack
        self._weights = self._read_weights(path / WEIGHTS)
        self._capacity = -(-capacity // 32) * 32
        self.caches = [self._cache(batch) for _ in range(self.index["num_layers"])]
        self.lengths = np.zeros(batch, np.int64)

    def step(self, rows: dict[int, np.ndarray], by_function: bool = False) -> tuple[np.ndarray, list[np.ndarray]]:
        """Append ids to some rows. -> logits of every new position, row by row, and the hidden states around the
        layers (only with `by_function`, which calls `embed`, `layer` and `head` one by one)."""
        ids = np.concatenate(list(rows.values()))
        counts = {row: len(new) for row, new in rows.items()}
        assert all(self.lengths[row] + count <= self.index["max_seq_len"] for row, count in counts.items())
        first = np.cumsum([0, *counts.values()])
        segments = [[row, first[i], counts[row], self.lengths[row]] for i, row in enumerate(rows)]
        positions = [self.lengths[row] + i for row, count in counts.items() for i in range(count)]
        token_rows = [row for row, count in counts.items() for _ in range(count)]
        arrays = [aligned_copy(each, np.int32) for each in (ids, positions, token_rows, segments, range(len(ids)))]
        hidden = aligned((len(ids), self.index["hidden_size"]), np.float32)
        logits = aligned((len(ids), self.index["vocab_size"]), np.float32)
        states: list[np.ndarray] = []
        if by_function:
            states = self._by_function(arrays, hidden, logits)
        else:
            tensors = [self._dlpack(array) for array in (*arrays, hidden, logits)]
            caches = tuple(tuple(map(self._dlpack, cache)) for cache in self.caches)
            names = [self.index["embedding"], *self.index["layers"], self.index["head"]]
            weights = tuple(self._tensors(each) for each in names)
            self.library.function("forward")(*tensors, caches, weights)
        for row, count in counts.items():
            self.lengths[row] += count
        return logits, states

    def _by_function(self, arrays: list[np.ndarray], hidden: np.ndarray, logits: np.ndarray) -> list[np.ndarray]:
        ids, positions, token_rows, segments, out_rows = map(self._dlpack, arrays)
        stream = self._dlpack(hidden)
        function, index = self.library.function, self.index
        function("embed")(ids, stream, self._tensors(index["embedding"]))
        states = [hidden.copy()]
        for name, cache, weights in zip(index["layer_functions"], self.caches, index["layers"], strict=True):
            tensors = tuple(map(self._dlpack, cache))
            function(name)(stream, positions, token_rows, segments, tensors, self._tensors(weights))
            states.append(hidden.copy())
        function("head")(stream, out_rows, self._dlpack(logits), self._tensors(index["head"]))
        return states

    def _tensors(self, names: list[str]) -> tuple[Any, ...]:
        return tuple(self._dlpack(self._weights[name]) for name in names)

    def _read_weights(self, path: Path) -> dict[str, np.ndarray]:
        data = path.read_bytes()
        weights = {}
        for name, entry in self.index["tensors"].items():
            raw = np.frombuffer(data, np.uint8)[entry["offset"] : entry["offset"] + entry["bytes"]]
            weights[name] = aligned_copy(raw, np.uint8).view(entry["dtype"]).reshape(entry["shape"])
        return weights

    def _cache(self, batch: int) -> list[np.ndarray]:
        index, capacity = self.index, self._capacity
        heads, width, kind = index["num_kv_heads"], index["head_dim"], index["cache"]["kind"]
        dtype = CACHE_TYPES[kind]
        arrays = [
            aligned((batch, heads, capacity // 32, width, 32), dtype),
            aligned((batch, heads, capacity, index["cache"]["value_width"]), dtype),
        ]
        if kind == "int8":
            arrays += [aligned((batch, heads, capacity), np.float32) for _ in range(2)]
        return arrays
