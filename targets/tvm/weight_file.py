"""The weights file, written tensor by tensor and block by block, never a whole matrix in memory.

Every tensor starts at a multiple of 4096 bytes. Blocks are read, quantized and packed on several threads; each is
written where it belongs, so the bytes do not depend on the order in which they are done.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.disk import output_errors
from exporter.core.weights import QuantizedRows
from targets.base import RowReader
from targets.tvm.isa import Isa
from targets.tvm.stored import StoredWeight, packed_layout, stored_type

ALIGNMENT = 4096
# About 10 MB in hand for each thread.
CHUNK_ELEMENTS = 1 << 20
MAX_THREADS = 4

Report = Callable[[float, str], None]
"""Told the fraction of bytes written and the tensor in hand."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: its type as kernels see it, and where its bytes lie."""

    stored: StoredWeight
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, object]:
        return {"dtype": self.dtype, "shape": list(self.shape), "offset": self.offset, "bytes": self.nbytes}


@dataclass(frozen=True)
class WeightPlan:
    """Where everything lies: distinct weights in the order of the file. Equal weights are one tensor."""

    tensors: dict[str, StoredTensor]
    names: dict[StoredWeight, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the file, whole pages."""
        return max((_aligned(tensor.offset + tensor.nbytes) for tensor in self.tensors.values()), default=0)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the tensors alone."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_weights(weights: Iterable[StoredWeight], checkpoint: Checkpoint, isa: Isa) -> WeightPlan:
    """Give every distinct weight a place; a tensor carries the name of the first weight that it holds."""
    tensors: dict[str, StoredTensor] = {}
    names: dict[StoredWeight, str] = {}
    first: dict[object, str] = {}
    end = 0
    for stored in weights:
        name = first.setdefault(stored.key, _free_name(stored.name, tensors))
        names[stored] = name
        if name not in tensors:
            tensors[name] = StoredTensor(stored, *stored_type(stored, checkpoint, isa), end)
            end = _aligned(end + tensors[name].nbytes)
    return WeightPlan(tensors, names)


def write_weights(
    path: Path, plan: WeightPlan, checkpoint: Checkpoint, isa: Isa, rows: RowReader, report: Report, threads: int = 0
) -> None:
    """Fill the file. Raises InputError when the disk is full, and whatever `rows` raises.

    `threads` 0 takes one for each CPU, at most four: they hold about 10 MB each.
    """
    threads = threads or min(len(os.sched_getaffinity(0)), MAX_THREADS)
    with output_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        with output_errors(path):
            os.ftruncate(descriptor, plan.nbytes)
        jobs = (job for tensor in plan.tensors.values() for job in _jobs(tensor, checkpoint, isa, rows))
        done, total = 0, max(1, plan.weights_bytes)
        for name, offset, data in _in_order(jobs, threads):
            with output_errors(path):
                _write(descriptor, data, offset)
            done += data.nbytes
            report(done / total, name)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Job:
    """Some bytes of the file, and how they are made (on any thread)."""

    name: str
    offset: int
    make: Callable[[], np.ndarray]


def _jobs(tensor: StoredTensor, checkpoint: Checkpoint, isa: Isa, rows: RowReader) -> Iterator[_Job]:
    stored, weight = tensor.stored, tensor.stored.weight
    packed = packed_layout(stored, checkpoint, isa)
    if not isinstance(weight, CheckpointWeight):
        yield _Job(stored.name, tensor.offset, weight.values)
        return
    if packed is None:
        yield _Job(stored.name, tensor.offset, partial(_vector, rows, weight, tensor.shape[0]))
        return
    blocks = packed.blocks
    step = max(1, CHUNK_ELEMENTS // max(1, packed.width * packed.rows // blocks))

    def read(start: int, stop: int) -> np.ndarray | QuantizedRows:
        return rows(weight, start, stop)

    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        offset = tensor.offset + first * (packed.nbytes // blocks)
        yield _Job(stored.name, offset, partial(packed.pack, first, count, read))


def _vector(rows: RowReader, weight: CheckpointWeight, length: int) -> np.ndarray:
    values = rows(weight, 0, length)
    assert isinstance(values, np.ndarray)
    return values.astype(np.float32, copy=False)


def _in_order(jobs: Iterator[_Job], threads: int) -> Iterator[tuple[str, int, np.ndarray]]:
    """Name, offset and bytes of each job, prepared ahead, one more than there are threads."""
    with ThreadPoolExecutor(threads, thread_name_prefix="pack-weights") as pool:
        pending: deque[tuple[_Job, Future[np.ndarray]]] = deque()
        try:
            for job in jobs:
                pending.append((job, pool.submit(job.make)))
                if len(pending) > threads:
                    finished, future = pending.popleft()
                    yield finished.name, finished.offset, future.result()
            while pending:
                finished, future = pending.popleft()
                yield finished.name, finished.offset, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def _write(descriptor: int, data: np.ndarray, offset: int) -> None:
    view = np.ascontiguousarray(data).view(np.uint8).reshape(-1).data
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def _free_name(name: str, taken: dict[str, StoredTensor]) -> str:
    """The name, or with a number behind it where another weight has it."""
    numbered = (f"{name}.{number}" if number else name for number in range(len(taken) + 1))
    return next(each for each in numbered if each not in taken)


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
