"""KV caches as the kernels lay them out (docs/targets.md), in one region whose pages come when they are written.

On 2 MB pages a row takes at most 2 MB more, per layer and head, than the positions it holds.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from targets.tvm.engine_files import EngineIndex
from targets.tvm.pages import allocate_pages

# So that no two tensors share a page of the system.
TENSOR_ALIGNMENT = 4096
STORAGE: dict[str, np.dtype] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "int8": np.dtype(np.int8)}
SCALE: np.dtype = np.dtype(np.float32)


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def room(self) -> int:
        return -(-self.nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT


def capacity_of(positions: int, index: EngineIndex) -> int:
    """Positions that a row has room for: whole blocks."""
    return -(-positions // index.cache_block) * index.cache_block


def allocate_caches(index: EngineIndex, batch: int, positions: int) -> list[tuple[np.ndarray, ...]]:
    """For every layer key [B, Hkv, S / 32, D, 32] and value [B, Hkv, S, Dp], zeroed; for int8 also key_scale and
    value_scale float32 [B, Hkv, S]. Raises MemoryError."""
    capacity, heads = capacity_of(positions, index), (batch, index.num_kv_heads)
    block, storage = index.cache_block, STORAGE[index.cache_kind]
    tensors = [
        _Tensor((*heads, capacity // block, index.head_dim, block), storage),
        _Tensor((*heads, capacity, index.value_width), storage),
    ]
    if index.cache_kind == "int8":
        tensors += [_Tensor((*heads, capacity), SCALE)] * 2
    pages = allocate_pages(index.num_layers * sum(tensor.room for tensor in tensors))
    caches, start = [], 0
    for _ in range(index.num_layers):
        layer = []
        for tensor in tensors:
            layer.append(pages[start : start + tensor.nbytes].view(tensor.dtype).reshape(tensor.shape))
            start += tensor.room
        caches.append(tuple(layer))
    return caches
