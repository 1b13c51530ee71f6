"""The commands under measurement, ours and the peer's, with the same Python interpreter."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = "int4-rtn"


def build_ours(
    checkpoint: Path, out: Path, parity: bool = False, recipe: str = RECIPE, target: str = "onnxruntime"
) -> list[str]:
    command = [sys.executable, "-m", "exporter", "build", str(checkpoint), "--target", target]
    command += ["--recipe", recipe, "--out", str(out), "--progress", "none"]
    return command if parity else [*command, "--no-parity"]


def build_genai(checkpoint: Path, out: Path) -> list[str]:
    """onnxruntime-genai's model builder: int4, blocks of 32, int8 activations (accuracy level 4)."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(checkpoint), "-o", str(out)]
    return [*command, "-p", "int4", "-e", "cpu", "--extra_options", "int4_accuracy_level=4"]


def run_json(command: list[str]) -> dict[str, Any]:
    """Run a command and parse the last line of its standard output; its errors go through."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}")
    parsed: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return parsed


def built(command: list[str], out: Path) -> Path:
    """Run a build command unless its output exists."""
    if not out.exists():
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}")
    return out


def directory_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
