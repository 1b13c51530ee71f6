"""Wall time of `enginesmith --help`, beside an interpreter that does nothing.

python -m tests.benchmarks.help_time [--repeat 15]
"""

import argparse
import subprocess
import sys
import time

from tests.benchmarks.report import show, spread

COMMANDS = {
    "enginesmith --help": [sys.executable, "-m", "exporter", "--help"],
    "python -c pass": [sys.executable, "-c", "pass"],
}


def wall_seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=15)
    repeat = parser.parse_args().repeat
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeat + 1):
        for name, command in COMMANDS.items():
            times[name].append(wall_seconds(command))
    # The first round fills the file cache and writes bytecode.
    rows = [{"command": name, **spread(found[1:])} for name, found in times.items()]
    show("Start-up, seconds", rows)


if __name__ == "__main__":
    main()
