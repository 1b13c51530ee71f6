"""Pieces written into safetensors files of bounded size, in chunks of rows, on a few threads.

Names are those of `save_pretrained`: model.safetensors, or model-00001-of-0000N.safetensors and an index.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np

from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import INDEX, SINGLE
from exporter.core.disk import output_errors
from targets.base import RowReader
from targets.tensorrt_llm.piece import Piece
from targets.tensorrt_llm.tensor_file import TensorFile, TensorSpec, plan_shards

SHARD_BYTES = 5_000_000_000
CHUNK_ELEMENTS = 1 << 20
THREADS = 2
METADATA = {"format": "pt"}
"""Readers of transformers refuse files that do not say it."""

Report = Callable[[float, str], None]


def write_pieces(
    out_dir: Path, pieces: Sequence[Piece], rows: RowReader, progress: Report, shard_bytes: int = SHARD_BYTES
) -> tuple[list[str], int]:
    """Write every tensor of the pieces; the files' names, index included, and the bytes of all tensors."""
    shards = plan_shards([spec for piece in pieces for spec in piece.encoder.specs], shard_bytes)
    names = _file_names(len(shards))
    with ExitStack() as stack:
        files = [
            stack.enter_context(TensorFile.create(out_dir / name, specs, METADATA))
            for name, specs in zip(names, shards, strict=True)
        ]
        places = {spec.name: file for file in files for spec in file.specs}
        total, done = sum(prod(piece.shape) for piece in pieces), 0
        for piece, start, stop in _encoded(pieces, rows, places):
            done += (stop - start) * prod(piece.shape[1:])
            progress(done / max(total, 1), piece.name)
        for piece in pieces:
            for name, values in piece.encoder.constants().items():
                places[name].write(name, 0, values)
    size = sum(spec.nbytes for specs in shards for spec in specs)
    if len(names) > 1:
        _write_index(out_dir, names, shards, size)
        names = [*names, INDEX]
    return names, size


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def _write_index(out_dir: Path, names: Sequence[str], shards: Sequence[Sequence[TensorSpec]], size: int) -> None:
    weight_map = {spec.name: name for name, specs in zip(names, shards, strict=True) for spec in specs}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out_dir / INDEX, index)


def write_json(path: Path, value: object) -> None:
    """As transformers writes its JSON: indented by two, a line feed at the end."""
    with output_errors(path):
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _chunks(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, int, int]]:
    """Ranges of an even number of rows that cover each piece."""
    for piece in pieces:
        step = max(2, CHUNK_ELEMENTS // max(prod(piece.shape[1:]), 1) // 2 * 2)
        for start in range(0, piece.shape[0], step):
            yield piece, start, min(start + step, piece.shape[0])


def _encoded(
    pieces: Sequence[Piece], rows: RowReader, places: Mapping[str, TensorFile]
) -> Iterator[tuple[Piece, int, int]]:
    """Each chunk once it is in its files; a few are under way at a time."""

    def work(piece: Piece, start: int, stop: int) -> tuple[Piece, int, int]:
        encoded = piece.encoder.encode(rows(CheckpointWeight((piece.name,), piece.precision), start, stop))
        for name, values in encoded.items():
            _write_part(places[name], name, values, start, piece.shape[0])
        return piece, start, stop

    chunks = _chunks(pieces)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint") as pool:
        pending: deque[Future[tuple[Piece, int, int]]] = deque()
        try:
            for chunk in islice(chunks, THREADS + 1):
                pending.append(pool.submit(work, *chunk))
            while pending:
                result = pending.popleft().result()
                for chunk in islice(chunks, 1):
                    pending.append(pool.submit(work, *chunk))
                yield result
        finally:
            for future in pending:
                future.cancel()


def _write_part(file: TensorFile, name: str, values: np.ndarray, start: int, rows: int) -> None:
    """Rows of a stored tensor that has fewer, or as many, than the source's `rows`."""
    stored = next(spec for spec in file.specs if spec.name == name).shape[0]
    file.write(name, start * stored // rows, values)
