"""SHA-256 of an artifact's files, in chunks of 16 MiB on all cores.

A file of one chunk has its plain digest. A larger one also lists the digest of every chunk: loading
verifies those in parallel (a serial SHA-256 of a large file would take as long as reading it several
times over), while `sha256` stays what `sha256sum` prints.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 16 << 20
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact. `chunks` holds the digest of each 16 MiB, empty for files of one chunk."""

    path: str
    bytes: int
    sha256: str
    chunks: tuple[str, ...] = ()

    @property
    def expected_chunks(self) -> int:
        """How many chunk digests an entry of this size lists."""
        return -(-self.bytes // CHUNK_BYTES) if self.bytes > CHUNK_BYTES else 0

    @property
    def chunk_digests(self) -> tuple[str, ...]:
        """What loading verifies, chunk by chunk."""
        return self.chunks or (self.sha256,)


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """hashlib releases the GIL, so threads use every core that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(max_workers=cpus)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def hash_files(directory: Path, paths: list[str]) -> tuple[FileEntry, ...]:
    """The entries of `paths`, in their order."""
    with _pool() as pool:
        pending = []
        for path in paths:
            size = (directory / path).stat().st_size
            whole = pool.submit(_digest, directory / path, 0, size)
            pending.append((path, size, whole, _submit_chunks(pool, directory / path, size)))
        return tuple(
            FileEntry(path, size, whole.result(), tuple(chunk.result() for chunk in chunks))
            for path, size, whole, chunks in pending
        )


def _submit_chunks(pool: ThreadPoolExecutor, file: Path, size: int) -> list[Future[str]]:
    if size <= CHUNK_BYTES:
        return []
    return [pool.submit(_digest, file, start, min(CHUNK_BYTES, size - start)) for start in range(0, size, CHUNK_BYTES)]


def damaged_files(directory: Path, entries: tuple[FileEntry, ...]) -> list[str]:
    """What differs from the entries, as "path (chunk i of n)"; files must exist with the right size."""
    with _pool() as pool:
        pending = []
        for entry in entries:
            file, count = directory / entry.path, len(entry.chunk_digests)
            for index, expected in enumerate(entry.chunk_digests):
                start = index * CHUNK_BYTES
                future = pool.submit(_digest, file, start, min(CHUNK_BYTES, entry.bytes - start))
                pending.append((entry.path, index, count, expected, future))
        return [
            path if count == 1 else f"{path} (chunk {index + 1} of {count})"
            for path, index, count, expected, future in pending
            if future.result() != expected
        ]


def _digest(file: Path, start: int, length: int) -> str:
    """SHA-256 of a range; of what there is of it, when the file is shorter."""
    state, block = hashlib.sha256(), bytearray(min(BLOCK_BYTES, max(length, 1)))
    view = memoryview(block)
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        position, end = start, start + length
        while position < end:
            count = os.preadv(descriptor, [view[: min(len(block), end - position)]], position)
            if count <= 0:
                break
            state.update(view[:count])
            position += count
    finally:
        os.close(descriptor)
    return state.hexdigest()
