"""C sources that are linked into every engine library."""

from pathlib import Path

THREAD_POOL = Path(__file__).with_name("thread_pool.c")
"""Runs the parallel loops of the kernels; the library exports `threads(n)` for it. Needs only libc and pthreads."""
