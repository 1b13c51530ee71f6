"""Giving memory back to the system."""

import ctypes


def release_free_memory() -> None:
    """Give memory that was freed back to the system; the C library keeps it otherwise. Nothing where it cannot."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
