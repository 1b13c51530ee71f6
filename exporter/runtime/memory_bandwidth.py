"""How fast this machine reads memory, measured as decoding reads weights: once, in order, from every thread."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BUFFER_BYTES = 512 << 20
REPETITIONS = 5


def measure_bandwidth(threads: int, buffer_bytes: int = BUFFER_BYTES, repetitions: int = REPETITIONS) -> float:
    """Bytes per second of the fastest of several passes.

    Each thread takes the maximum of its part of an int8 buffer far larger than any cache: NumPy does this
    with vector instructions, reads every byte once, writes nothing, and holds no lock meanwhile. The
    fastest pass counts, since whatever else the machine does can only slow one down.
    """
    parts = np.array_split(np.ones(buffer_bytes, np.int8), threads)
    with ThreadPoolExecutor(threads) as pool:
        return max(buffer_bytes / _one_pass(pool, parts) for _ in range(repetitions))


def _one_pass(pool: ThreadPoolExecutor, parts: list[np.ndarray]) -> float:
    start = time.perf_counter()
    assert all(maximum == 1 for maximum in pool.map(np.max, parts))
    return time.perf_counter() - start
