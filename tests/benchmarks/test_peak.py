"""The memory meter sees what a process and its children keep resident."""

import sys
from pathlib import Path

from tests.benchmarks.peak import measure

MEGABYTE = 1 << 20
HOLD = "import time; held = bytearray(b'x') * ({size} << 20); time.sleep(0.4)"


def test_peak_of_one_process(tmp_path: Path) -> None:
    measured = measure([sys.executable, "-c", HOLD.format(size=200)], tmp_path / "log")
    assert measured.exit_code == 0
    assert measured.wall_seconds > 0.4
    assert 200 * MEGABYTE <= measured.peak_tree_rss_bytes <= measured.peak_bytes < 260 * MEGABYTE


def test_peak_is_the_sum_over_the_tree(tmp_path: Path) -> None:
    child = f"subprocess.run([sys.executable, '-c', {HOLD.format(size=150)!r}])"
    code = f"import subprocess, sys; held = bytearray(b'x') * (150 << 20); {child}"
    measured = measure([sys.executable, "-c", code], tmp_path / "log")
    assert 300 * MEGABYTE <= measured.peak_tree_rss_bytes < 360 * MEGABYTE
    assert 150 * MEGABYTE <= measured.peak_process_rss_bytes < 200 * MEGABYTE


def test_exit_code_and_output_are_kept(tmp_path: Path) -> None:
    measured = measure([sys.executable, "-c", "print('said'); raise SystemExit(7)"], tmp_path / "log")
    assert measured.exit_code == 7
    assert (tmp_path / "log").read_text() == "said\n"
