"""Safetensors files written byte by byte, sound or not, without the library that would refuse to."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}


def entry(dtype: str, shape: list[Any], first: int, last: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def file_bytes(header: object, data: bytes, length: int | None = None) -> bytes:
    """A file of this header (an object, or its bytes) and data; `length` overrides what the prefix claims."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a sound file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def plant(path: Path, tensor: str, index: int, bits: int) -> None:
    """Overwrite element `index` (may be negative) of a tensor with a bit pattern."""
    header, data = split(path)
    described = header[tensor]
    width = WIDTHS[described["dtype"]]
    first, last = described["data_offsets"]
    elements = np.frombuffer(data[first:last], f"<u{width}").copy()
    elements[index] = bits
    path.write_bytes(file_bytes(header, data[:first] + elements.tobytes() + data[last:]))
