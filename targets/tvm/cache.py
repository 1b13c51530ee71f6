"""KV caches as the kernels lay them out (docs/targets.md), in one region whose pages come when they are written.

On 2 MB pages a row takes at most 2 MB more, per layer and head, than the positions it holds.
"""

from math import prod

import numpy as np

from targets.tvm.engine_files import EngineIndex
from targets.tvm.kernels.cache_format import cache_shapes
from targets.tvm.pages import allocate_pages

# So that no two tensors share a page of the system.
TENSOR_ALIGNMENT = 4096


def allocate_caches(index: EngineIndex, batch: int, positions: int) -> list[tuple[np.ndarray, ...]]:
    """For every layer key [B, Hkv, S / 32, D, 32] and value [B, Hkv, S, Dp], zeroed; for int8 also key_scale and
    value_scale float32 [B, Hkv, S]. Raises MemoryError."""
    tensors = cache_shapes(
        index.cache_kind,
        batch,
        index.num_kv_heads,
        positions,
        index.head_dim,
        index.value_width,
        index.cache_block,
    )
    sizes = [prod(shape) * np.dtype(dtype).itemsize for shape, dtype in tensors]
    room = [-(-size // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT for size in sizes]
    pages = allocate_pages(index.num_layers * sum(room))
    caches, start = [], 0
    for _ in range(index.num_layers):
        layer = []
        for (shape, dtype), size, taken in zip(tensors, sizes, room, strict=True):
            layer.append(pages[start : start + size].view(dtype).reshape(shape))
            start += taken
        caches.append(tuple(layer))
    return caches
