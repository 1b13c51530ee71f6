"""Writes a file of quantization parameters in a stream; nothing half-written ever has its name."""

import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from calibration import qparams_format as layout
from calibration.codecs import pack_nibbles
from calibration.qparams import QParams
from calibration.qparams_check import check_codes, check_scales
from calibration.recipe_json import recipe_to_json
from calibration.transforms import ScaleInput, Transform
from exporter.core.disk import output_errors
from exporter.core.recipe import Precision, Recipe
from exporter.core.safetensors_file import TensorInfo
from exporter.core.temporary_directory import CALIBRATION, create
from exporter.core.weights import QuantizedRows

COPY_BYTES = 1 << 20
READABLE = 0o644  # temporary files are their owner's alone
DTYPE_NAMES = {dtype: name for name, dtype in layout.DTYPES.items()}


@dataclass
class _Pending:
    """A tensor that waits for its place: dtype, shape, and the pieces of files that hold its bytes in order."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: list[tuple[Path | None, int, int]]  # file (None: the spool), first byte, length

    @property
    def nbytes(self) -> int:
        return sum(length for _, _, length in self.pieces)


class QParamsWriter:
    """`with QParamsWriter(path, source_digest=.., recipe=.., data=..) as writer:` add things, then `writer.finish()`.

    Data waits in a nameless temporary file beside `path` until `finish` knows the header; leaving the block without
    `finish` leaves nothing. Equal content gives equal bytes, whatever the order of codes and statistics; transforms
    are applied in the order they were added in. `part` names a piece of a calibration under way, which `add_part`
    takes over into the whole. Raises InputError (`output.full`, `output.write`) where the disk fails.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        source_digest: str,
        recipe: Recipe,
        data: Mapping[str, object] | None = None,
        part: str | None = None,
    ) -> None:
        self.path = Path(path)
        self._recipe = recipe
        self._metadata = {
            "format": layout.FORMAT,
            "version": str(layout.VERSION),
            "source_digest": source_digest,
            "recipe": layout.to_text(recipe_to_json(recipe)),
            "data": layout.to_text(None if data is None else dict(data)),
            "shared_scales": layout.to_text(layout.SHARED_SCALES),
            **({} if part is None else {"part": part}),
        }
        self._transforms: list[Transform] = []
        self._reports: dict[str, dict[str, object]] = {}
        self._pending: dict[str, _Pending] = {}
        with output_errors(self.path):
            self._spool: IO[bytes] = tempfile.TemporaryFile(dir=self.path.absolute().parent)  # noqa: SIM115

    def add_transform(self, transform: Transform) -> None:
        """The next of the ordered transforms."""
        if isinstance(transform, ScaleInput):
            self._add_array(f"transforms.{len(self._transforms)}.scale", transform.scale)
        self._transforms.append(transform)

    def add_codes(self, tensor: str, blocks: QuantizedRows | Iterable[QuantizedRows]) -> None:
        """All rows of a tensor, in order, at one precision. An even number of codes a row where they have 4 bits."""
        key, added = "", 0
        for block in [blocks] if isinstance(blocks, QuantizedRows) else blocks:
            if key not in ("", layout.codes_key(tensor, block.precision)) or (not key and self._has(tensor, block)):
                raise ValueError(f"{tensor} is given twice, or at two precisions")
            key = layout.codes_key(tensor, block.precision)
            check_scales(block.scales, block.precision, tensor)
            check_codes(block, tensor)
            self._append(f"{key}.codes", _stored_codes(block.codes, block.precision))
            self._append(f"{key}.scales", np.asarray(block.scales, np.float32))
            if block.zero_points is not None:
                self._append(f"{key}.zero_points", np.asarray(block.zero_points, np.uint8))
            added += len(block.codes)
        if not added:
            raise ValueError(f"{tensor} has no rows")

    def add_input_amax(self, layer: int | None, point: str, amax: np.ndarray, clip: float | None = None) -> None:
        """Largest |x| a channel at a point of a layer (None and `head_input`: of the head): float32 [K].

        `clip`: the magnitude that a single scale should reach, where an observer chose less than the largest.
        """
        key = layout.point_key(layer, point)
        self._add_array(f"{key}.amax", amax)
        if clip is not None:
            self._add_array(f"{key}.clip", np.array([clip]))

    def add_kv_amax(self, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Largest |k| and |v| a channel: float32 [Hkv * D] each."""
        self._add_array(f"model.layers.{layer}.k_amax", keys)
        self._add_array(f"model.layers.{layer}.v_amax", values)

    def add_report(self, name: str, report: Mapping[str, object]) -> None:
        """What an algorithm found (`model.layers.0.mlp.down_proj`: alpha, damping ...), JSON-ready, finite numbers."""
        if name in self._reports:
            raise ValueError(f"two reports of {name}")
        layout.to_text(dict(report))
        self._reports[name] = dict(report)

    def add_part(self, part: QParams) -> None:
        """Everything of a part: transforms, codes, statistics, reports. Its file must stay until `finish`."""
        for transform in part.transforms:
            self.add_transform(transform)
        for name, report in part.reports.items():
            self.add_report(name, report)
        for name, info in part.tensors.items():
            if layout.TRANSFORM_SCALE.fullmatch(name):
                continue
            if name in self._pending:
                raise ValueError(f"{name} is given twice")
            self._pending[name] = _Pending(info.dtype, info.shape, [_piece_of(info)])

    def finish(self) -> QParams:
        """Writes header and data under the final name and opens the result."""
        with output_errors(self.path):
            folder = create(self.path, CALIBRATION)
            try:
                written = folder.path / self.path.name
                with written.open("wb") as file:
                    self._write(file)
                QParams.open(written)
                written.replace(self.path)
            finally:
                folder.remove()
        self._spool.close()
        return QParams.open(self.path)

    def _write(self, file: IO[bytes]) -> None:
        names = sorted(self._pending, key=lambda name: (-self._pending[name].dtype.itemsize, name))
        file.write(self._header(names))
        for name in names:
            file.writelines(self._bytes_of(self._pending[name]))
        file.flush()
        os.fchmod(file.fileno(), READABLE)
        os.fsync(file.fileno())

    def __enter__(self) -> "QParamsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.close()

    def _has(self, tensor: str, block: QuantizedRows) -> bool:
        return f"{layout.codes_key(tensor, block.precision)}.codes" in self._pending

    def _add_array(self, name: str, values: np.ndarray) -> None:
        if name in self._pending:
            raise ValueError(f"{name} is given twice")
        self._append(name, np.asarray(values, np.float32))

    def _append(self, name: str, rows: np.ndarray) -> None:
        """More rows of a tensor, into the spool."""
        data = np.ascontiguousarray(rows)
        with output_errors(self.path):
            start = self._spool.seek(0, os.SEEK_END)
            self._spool.write(data.view(np.uint8).reshape(-1).data)
        found = self._pending.setdefault(name, _Pending(data.dtype, (0, *data.shape[1:]), []))
        if (found.dtype, found.shape[1:]) != (data.dtype, data.shape[1:]):
            raise ValueError(f"rows of {name} differ in width or dtype")
        found.shape = (found.shape[0] + len(data), *data.shape[1:])
        found.pieces.append((None, start, data.nbytes))

    def _header(self, names: list[str]) -> bytes:
        """Length and JSON, filled up with spaces so that the data begin at a multiple of 8 bytes."""
        metadata = {
            **self._metadata,
            "transforms": layout.to_text(layout.transforms_to_json(self._transforms)),
            "reports": layout.to_text(self._reports),
        }
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        first = 0
        for name in names:
            tensor = self._pending[name]
            last = first + tensor.nbytes
            described = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [first, last]}
            header[name], first = described, last
        # Not sorted: readers take tensors in the order of their data.
        text = layout.to_text(header, sort_keys=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def _bytes_of(self, tensor: _Pending) -> Iterator[bytes]:
        for path, start, length in tensor.pieces:
            if path is None:
                yield from _copy(self._spool, start, length)
            else:
                with path.open("rb") as file:
                    yield from _copy(file, start, length)


def _stored_codes(codes: np.ndarray, precision: Precision) -> np.ndarray:
    """Codes as the file has them: packed where they have 4 bits."""
    if precision.bits != 4:
        return codes.astype(layout.codes_dtype(precision), copy=False)
    if codes.shape[1] % 2:
        raise ValueError(f"a row of {codes.shape[1]} codes of 4 bits has no whole number of bytes")
    return pack_nibbles(codes)


def _piece_of(info: TensorInfo) -> tuple[Path | None, int, int]:
    return info.path, info.offset, info.nbytes


def _copy(file: IO[bytes], start: int, length: int) -> Iterator[bytes]:
    file.seek(start)
    while length:
        chunk = file.read(min(COPY_BYTES, length))
        if not chunk:
            raise ValueError("a part of the calibration was cut short")
        length -= len(chunk)
        yield chunk
