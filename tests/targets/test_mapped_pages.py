"""Dropping mapped pages: out of memory, not out of the file."""

import mmap
import re
from pathlib import Path

from targets.onnxruntime.mapped_pages import drop_mapped_pages

BYTES = 8 << 20


def resident_kilobytes(file: Path) -> int:
    """What /proc says this process holds of a mapped file."""
    smaps = Path("/proc/self/smaps").read_text()
    return sum(int(size) for size in re.findall(rf"{re.escape(str(file))}\n(?:.*\n)*?Rss:\s+(\d+) kB", smaps))


def test_pages_leave_and_come_back(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    content = bytes(range(256)) * (BYTES // 256)
    file.write_bytes(content)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        assert mapped[:] == content
        assert resident_kilobytes(file) == BYTES // 1024
        drop_mapped_pages(file)
        assert resident_kilobytes(file) == 0
        assert mapped[:] == content


def test_a_file_that_is_not_mapped_is_no_matter(tmp_path: Path) -> None:
    drop_mapped_pages(tmp_path / "nowhere")
