"""Reading one safetensors file tensor by tensor: header checks first, then positioned reads, never a map.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from exporter.core.errors import InputError, UnsupportedError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file, dtype, shape, first byte and length."""

    name: str
    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file, after checking that the header is sound and the file holds every byte it promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _damaged(path, "truncated", f"it has {size} bytes, too few for a header")
        length = struct.unpack("<Q", prefix)[0]
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise _damaged(path, "header", f"its header claims {length} bytes of {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise _damaged(path, "header", f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "header", "its header is not an object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _tensor_info(path: Path, name: str, entry: object, start: int, size: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise _damaged(path, "header", f"tensor {name!r} has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPES:
        raise UnsupportedError(
            "checkpoint.dtype",
            f"{path.name}: tensor {name!r} is stored as {dtype}",
            "supported: BF16, F16, F32; convert the checkpoint first",
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise _damaged(path, "header", f"tensor {name!r} has shape {shape} and offsets {offsets}")
    first, last = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if last - first != expected:
        raise _damaged(path, "header", f"tensor {name!r} claims {last - first} bytes, its shape needs {expected}")
    if start + last > size:
        raise _damaged(path, "truncated", f"tensor {name!r} ends at byte {start + last} of a file of {size}")
    return TensorInfo(name, path, DTYPES[dtype], tuple(shape), start + first, expected)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    """Tensors must follow one another without overlap, gap or trailing bytes, as the format demands."""
    end = start
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset != end:
            raise _damaged(path, "header", f"tensor {info.name!r} starts at byte {info.offset}, expected {end}")
        end += info.nbytes
    if end != size:
        raise _damaged(path, "trailing", f"{size - end} bytes follow the last tensor")


def read_rows(info: TensorInfo, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) along the first axis, in the stored dtype; reads just those bytes."""
    row_bytes = info.nbytes // info.shape[0]
    out = np.empty((stop - start, *info.shape[1:]), info.dtype)
    view = memoryview(out.view(np.uint8).reshape(-1)) if out.size else memoryview(b"")
    descriptor = os.open(info.path, os.O_RDONLY)
    try:
        position, done = info.offset + start * row_bytes, 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], position + done)
            if count <= 0:
                raise _damaged(info.path, "truncated", f"tensor {info.name!r} ended early: the file changed")
            done += count
    finally:
        os.close(descriptor)
    return out


def _damaged(path: Path, kind: str, why: str) -> InputError:
    return InputError(f"checkpoint.{kind}", f"{path.name} is damaged: {why}", "download or export the file again")
