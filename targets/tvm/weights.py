"""weights.bin in memory, once: read by several threads straight into 2 MB pages."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from exporter.core.errors import ArtifactError
from targets.tvm.engine_files import EngineIndex, TensorEntry
from targets.tvm.pages import allocate_pages

READ_BYTES = 16 << 20


def read_weights(path: Path, index: EngineIndex, threads: int) -> dict[str, np.ndarray]:
    """Every tensor of an engine as a view of one buffer. Raises ArtifactError `tvm.weights`, MemoryError."""
    try:
        # Before memory is asked for, which a damaged index may want more of than there is.
        if (size := path.stat().st_size) < index.weights_bytes:
            raise OSError(0, f"it ends at byte {size}, {index.weights_bytes} are needed")
        pages = allocate_pages(index.weights_bytes)
        _fill(pages, path, threads)
    except OSError as error:
        raise ArtifactError(
            "tvm.weights", f"cannot read {path.name}: {error.strerror or error}", "copy the engine again"
        ) from error
    return tensor_views(pages, index.tensors)


def tensor_views(pages: np.ndarray, tensors: Mapping[str, TensorEntry]) -> dict[str, np.ndarray]:
    """Arrays over uint8 [bytes] where the entries say they lie."""
    return {
        name: pages[entry.offset : entry.offset + entry.nbytes].view(entry.dtype).reshape(entry.shape)
        for name, entry in tensors.items()
    }


def _fill(pages: np.ndarray, path: Path, threads: int) -> None:
    view = pages.data
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(start: int) -> None:
        end = min(start + READ_BYTES, len(view))
        while start < end:
            count = os.preadv(file, [view[start:end]], start)
            if count <= 0:
                raise OSError(0, f"it ends at byte {start}, {len(view)} are needed")
            start += count

    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
            list(pool.map(read, range(0, len(view), READ_BYTES)))
    finally:
        os.close(file)
