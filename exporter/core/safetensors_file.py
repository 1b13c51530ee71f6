"""Reading one safetensors file tensor by tensor: header checks first, then positioned reads, never a map.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import ml_dtypes
import numpy as np

from exporter.core.errors import InputError, UnsupportedError
from exporter.core.strict_json import parse_json, shorten

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
    return read_whole_header(path, DTYPES)[1]


def read_whole_header(path: Path, dtypes: Mapping[str, np.dtype]) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The metadata of a file and its tensors, which have these dtypes, after the same checks."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _read_json_header(path, file, size)
    except OSError as error:
        raise _damaged(path, "unreadable", f"the system refuses to read it ({error.strerror})") from error
    metadata = _metadata(path, header.pop("__metadata__", {}))
    tensors = {name: _tensor_info(path, name, entry, start, size, dtypes) for name, entry in header.items()}
    _check_layout(path, tensors, start, size)
    return metadata, tensors


def _read_json_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header object and the position of the first data byte."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise _damaged(path, "truncated", f"it has {size} bytes, too few for a header")
    length = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, "header", f"its header claims {length} bytes, more than any real one")
    if length > size - 8:
        raise _damaged(path, "truncated", f"its header claims {length} bytes, the file has {size}")
    data = file.read(length)
    # The format asks for `{` first; readers that skip white space would accept more than the reference does.
    if not data.startswith(b"{"):
        raise _damaged(path, "header", "its header is not a JSON object")
    try:
        return parse_json(data), 8 + length
    except ValueError as error:
        raise _damaged(path, "header", f"its header is not sound JSON: {error}") from error


def _metadata(path: Path, value: object) -> dict[str, str]:
    """Texts by name, or nothing, as the format demands."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _damaged(path, "header", "its metadata are not texts by name")
    return value


def _tensor_info(
    path: Path, name: str, entry: object, start: int, size: int, dtypes: Mapping[str, np.dtype]
) -> TensorInfo:
    shown = shorten(name)
    if not isinstance(entry, dict):
        raise _damaged(path, "header", f"tensor {shown} has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise _damaged(path, "header", f"tensor {shown} has dtype {shorten(dtype)}")
    if dtype not in dtypes:
        raise UnsupportedError(
            "checkpoint.dtype",
            f"{path.name}: tensor {shown} is stored as {shorten(dtype)}",
            f"supported: {', '.join(dtypes)}; convert the checkpoint first",
        )
    if not _naturals(shape, 8) or not _naturals(offsets, 2) or len(offsets) != 2:
        raise _damaged(path, "header", f"tensor {shown} has shape {shorten(shape)} and offsets {shorten(offsets)}")
    first, last = offsets
    expected = math.prod(shape) * dtypes[dtype].itemsize
    if last - first != expected:
        why = f"tensor {shown} claims {shorten(last - first)} bytes, its shape {shape} needs {shorten(expected)}"
        raise _damaged(path, "header", why)
    if start + last > size:
        raise _damaged(path, "truncated", f"tensor {shown} ends at byte {start + last} of a file of {size}")
    return TensorInfo(name, path, dtypes[dtype], tuple(shape), start + first, expected)


def _naturals(value: object, most: int) -> TypeGuard[list[int]]:
    """Whether it is a list of at most `most` numbers that a byte count can be (below 2**63)."""
    if not isinstance(value, list) or len(value) > most:
        return False
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in value)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    """Tensors must follow one another without overlap, gap or trailing bytes, as the format demands."""
    end = start
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset != end:
            raise _damaged(path, "header", f"tensor {shorten(info.name)} starts at byte {info.offset}, expected {end}")
        end += info.nbytes
    if end != size:
        raise _damaged(path, "trailing", f"{size - end} bytes follow the last tensor")


def read_rows(info: TensorInfo, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) along the first axis, in the stored dtype; reads just those bytes."""
    if not 0 <= start <= stop <= info.shape[0]:
        raise ValueError(f"rows {start} to {stop} of {info.name!r}, which has {info.shape[0]}")
    out = np.empty((stop - start, *info.shape[1:]), info.dtype)
    if out.size:
        row_bytes = info.nbytes // info.shape[0]
        _read_exactly(info, info.offset + start * row_bytes, out.view(np.uint8).reshape(-1).data)
    return out


def _read_exactly(info: TensorInfo, position: int, view: memoryview) -> None:
    """Fill the view from a file position; a single read returns at most 2 GiB."""
    try:
        descriptor = os.open(info.path, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], position + done)
                if count <= 0:
                    raise _damaged(info.path, "truncated", f"tensor {info.name!r} ended early: the file changed")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _damaged(info.path, "unreadable", f"the system refuses to read it ({error.strerror})") from error


def _damaged(path: Path, kind: str, why: str) -> InputError:
    return InputError(f"checkpoint.{kind}", f"{path.name} is damaged: {why}", "download or export the file again")
