"""Letting go of weight pages that ONNX Runtime has repacked and will not read again."""

import ctypes
import mmap
from pathlib import Path

MAPS = Path("/proc/self/maps")


def drop_mapped_pages(file: Path) -> None:
    """Take the pages of a mapped file out of this process's resident memory (madvise, MADV_DONTNEED).

    ONNX Runtime maps external weights privately and writes none of them, so a page that is needed again comes back
    from the page cache. Does nothing where the system has no such list of mappings.
    """
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:
        return
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advise is None or advice is None:
        return
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == str(file):
            start, end = (int(bound, 16) for bound in fields[0].split("-"))
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(advice))
