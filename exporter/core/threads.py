"""How many threads may be asked for."""

import os

from exporter.core.errors import InputError

# Beyond this the threads only wait for one another: 64 on two processors already take five times as long.
THREADS_PER_PROCESSOR = 8


def check_threads(threads: int) -> None:
    """Raise InputError unless `threads` is 0 (one per physical core) or a number this machine can make use of."""
    most = THREADS_PER_PROCESSOR * (os.cpu_count() or 1)
    if not 0 <= threads <= most:
        raise InputError(
            "usage.threads",
            f"threads is {threads}, this machine has {os.cpu_count()} processors",
            f"give 0 for one per physical core, or 1 to {most}",
        )
