"""Time and peak memory of calibrations.

    python -m tests.benchmarks.make_checkpoint llama-3.2-1b DIR --layers 2
    python -m tests.benchmarks.calibration_cost DIR --text FILE [--tokens 65536] [--recipes int4-gptq ...] [--depth 16]

A calibration holds one layer at a time, so a model of the full width and a few layers has the memory of the whole one.
Its time goes with the depth: the seconds of a layer are those of all layers by their number, from the progress that the
command reports, and `--depth` multiplies them; the head comes on top.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from exporter.core.config import ModelConfig
from tests.benchmarks.peak import INTERVAL, tree_memory
from tests.benchmarks.report import show

RECIPES = ("int8-smoothquant", "int4-awq", "int4-gptq")


def run_once(command: list[str]) -> tuple[dict[str, float], float, float]:
    """(when each step was first reported, the end, peak resident bytes); times in seconds from the start."""
    begun, seen, peak = time.perf_counter(), dict[str, float](), 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        done, family = threading.Event(), psutil.Process(process.pid)

        def sample() -> None:
            nonlocal peak
            while not done.wait(INTERVAL):
                peak = max(peak, *tree_memory(family))

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        assert process.stderr is not None
        for line in process.stderr:
            seen.setdefault(detail_of(line), time.perf_counter() - begun)
        done.set()
        sampler.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}: {list(seen)[-3:]}")
    return seen, time.perf_counter() - begun, peak


def detail_of(line: str) -> str:
    """The step that a line of progress is about; other lines as they are."""
    try:
        return str(json.loads(line).get("detail", ""))
    except ValueError:
        return line.strip()


def row(recipe: str, checkpoint: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    config, folder = ModelConfig.from_directory(checkpoint), Path(tempfile.mkdtemp(dir=arguments.work))
    command = [sys.executable, "-m", "exporter", "calibrate", str(checkpoint), "--recipe", recipe, "--seed", "0"]
    command += ["--calibration", str(arguments.text), "--calibration-tokens", str(arguments.tokens)]
    command += ["--out", str(folder / "parameters.qparams"), "--work-dir", str(folder / "work"), "--progress", "jsonl"]
    command += ["--max-ram", arguments.max_ram] if arguments.max_ram else []
    seen, end, peak = run_once(command)
    shutil.rmtree(folder)
    first = min(when for step, when in seen.items() if step.startswith("layer 1 "))
    head = seen.get("head", end)  # not reported where it follows at once
    layer = (head - first) / config.num_layers
    whole = first + layer * (arguments.depth or config.num_layers) + end - head
    names = {"recipe": recipe, "peak GB": peak / 1e9, "s before layers": first, "s a layer": layer}
    return {**names, "s head and file": end - head, "minutes in all": whole / 60}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--depth", type=int, help="layers of the whole model")
    parser.add_argument("--max-ram")
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    table = []
    for recipe in arguments.recipes:
        table.append(row(recipe, arguments.checkpoint, arguments))
        print(table[-1], flush=True)
    show(f"Calibration on {arguments.tokens} tokens", table)


if __name__ == "__main__":
    main()
