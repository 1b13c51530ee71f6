"""Run a command and print its wall time, processor time and peak resident memory as one JSON line.

    python -m tests.benchmarks.peak COMMAND ...

Resident memory is the kernel's figure, file pages included: `peak_tree_rss_bytes` is the largest sum over
the process tree at any sample (every 20 ms), `peak_process_rss_bytes` the highest VmHWM of a single process,
which also sees what comes and goes between two samples. (`ru_maxrss` would count the parent that forked.)
"""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

INTERVAL = 0.02  # seconds


@dataclass(frozen=True)
class Measurement:
    """One finished command; times in seconds, memory in bytes."""

    command: list[str]
    exit_code: int
    wall_seconds: float
    user_seconds: float
    system_seconds: float
    peak_tree_rss_bytes: int
    peak_process_rss_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The figure to quote: the larger of the sampled tree and the highest single process."""
        return max(self.peak_tree_rss_bytes, self.peak_process_rss_bytes)


def tree_memory(process: psutil.Process) -> tuple[int, int]:
    """Resident bytes of a process and its descendants: their sum now, and the highest mark of any one."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0, 0
    marks = [_resident(member.pid) for member in family]
    return sum(now for now, _ in marks), max(highest for _, highest in marks)


def _resident(pid: int) -> tuple[int, int]:
    """VmRSS and VmHWM of a process in bytes; zeros for one that has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in status.splitlines())
    now, highest = (int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, highest


class _Sampler(threading.Thread):
    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._done = pid, threading.Event()
        self.tree, self.single = 0, 0

    def run(self) -> None:
        try:
            process = psutil.Process(self._pid)
        except psutil.Error:
            return
        while not self._done.wait(INTERVAL):
            total, highest = tree_memory(process)
            self.tree, self.single = max(self.tree, total), max(self.single, highest)

    def stop(self) -> None:
        self._done.set()
        self.join()


def measure(command: list[str], log: Path | None = None) -> Measurement:
    """Run a command to its end; its output goes to `log` (default: standard error)."""
    with (log or Path(os.devnull)).open("wb") as sink:
        output = sink if log else sys.stderr
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=output)
        sampler = _Sampler(child.pid)
        sampler.start()
        # Not Popen.wait: wait4 gives the usage of this child alone, its own children included.
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        sampler.stop()
    return Measurement(
        command=command,
        exit_code=child.returncode,
        wall_seconds=wall,
        user_seconds=usage.ru_utime,
        system_seconds=usage.ru_stime,
        peak_tree_rss_bytes=sampler.tree,
        peak_process_rss_bytes=sampler.single,
    )


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    measured = measure(sys.argv[1:])
    print(json.dumps(asdict(measured)))
    sys.exit(measured.exit_code)


if __name__ == "__main__":
    main()
