"""Time and peak memory of building an int4 engine, beside onnxruntime-genai's model builder.

    python -m tests.benchmarks.build_cost CHECKPOINT [--work DIR] [--repeat 3] [--parity] [--no-peer]

Runs alternate between ours and the peer's. `--parity` adds a build of ours with every parity check.
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks.commands import build_genai, build_ours, directory_bytes
from tests.benchmarks.peak import Measurement, measure
from tests.benchmarks.report import show, spread

BUILDERS = {"enginesmith": build_ours, "onnxruntime-genai": build_genai}


def build_once(name: str, command: list[str], out: Path) -> tuple[Measurement, int]:
    """The measurement and the bytes written; the output is removed again."""
    log = out.with_suffix(".log")
    measured = measure(command, log)
    if measured.exit_code:
        sys.exit(f"{name} ended with {measured.exit_code}:\n{log.read_text()[-2000:]}")
    size = directory_bytes(out)
    shutil.rmtree(out)
    return measured, size


def warm(checkpoint: Path) -> None:
    """Read the weights once, so that the first run does not alone pay for the disk."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def summarise(name: str, runs: list[tuple[Measurement, int]]) -> dict[str, object]:
    wall = spread([measured.wall_seconds for measured, _ in runs])
    return {
        "builder": name,
        "wall s": wall["median"],
        "lowest": wall["lowest"],
        "highest": wall["highest"],
        "cpu s": spread([m.user_seconds + m.system_seconds for m, _ in runs])["median"],
        "peak GB": max(measured.peak_bytes for measured, _ in runs) / 1e9,
        "output GB": runs[0][1] / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, help="directory for outputs; default: a temporary one")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--no-peer", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        commands = {}
        for name, command in BUILDERS.items():
            if name == "enginesmith" or not arguments.no_peer:
                commands[name] = command(arguments.checkpoint, Path(folder) / name)
        if arguments.parity:
            name = "enginesmith, with parity"
            commands[name] = build_ours(arguments.checkpoint, Path(folder) / name.replace(", ", "-"), parity=True)
        warm(arguments.checkpoint)
        runs: dict[str, list[tuple[Measurement, int]]] = {name: [] for name in commands}
        for _ in range(arguments.repeat):
            for name, command in commands.items():
                runs[name].append(build_once(name, command, _output_of(command)))
    rows = [summarise(name, found) for name, found in runs.items()]
    details = {name: [asdict(measured) for measured, _ in found] for name, found in runs.items()}
    show(f"Build, int4: {arguments.checkpoint.name}", rows, runs=details)


def _output_of(command: list[str]) -> Path:
    flag = "--out" if "--out" in command else "-o"
    return Path(command[command.index(flag) + 1])


if __name__ == "__main__":
    main()
