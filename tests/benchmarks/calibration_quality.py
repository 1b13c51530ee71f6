"""Our recipes beside llm-compressor, modelopt and llama.cpp: divergence from the eager model, and bits per weight.

    python -m tests.benchmarks.calibration_quality examples/stdlib-llama --work DIR
        [--windows 16] [--group 32 128] [--recipes NAME ...] [--models plain variant]
        [--peers llama.cpp quantizers] [--methods NAME ...]

Two models: the checkpoint, and its variant with outlier channels (outlier_variant.py), which is the same function. All
tools see the same sequences of training text, `calibration` in DIR/tokens.npz; all are measured on the same windows of
held-out text. Every tool's weights stand in the same fp32 model, embedding and head untouched; rows `whole file` of
llama.cpp have those too. `--peers` takes the programs that peer_setup.py prepares in DIR/programs.

Rows are kept in DIR/*.jsonl and not measured again. The table is printed, and written to DIR/quality.csv.
"""

import argparse
import csv
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from calibration import data
from exporter.core.checkpoint import Checkpoint
from tests.benchmarks import calibration_llama, calibration_ours, peer_setup
from tests.benchmarks.calibration_peers import remembered
from tests.benchmarks.calibration_text import write_text
from tests.benchmarks.outlier_variant import write_variant
from tests.benchmarks.quality import Scorer, compare, eager, gguf_weights, windows
from tests.benchmarks.report import show

SEQUENCES, LENGTH = 128, 512
FIGURES = ("mean KL", "max KL", "ratio", "top-1 agreement")
Row = dict[str, Any]


def prepare(checkpoint: Path, work: Path, count: int) -> tuple[dict[str, Path], Path]:
    """The two models by name, and the file of tokens; made where they are missing."""
    work.mkdir(parents=True, exist_ok=True)
    variant = work / "variant"
    if not variant.exists():
        write_variant(checkpoint, variant)
    tokens = work / f"tokens-{count}.npz"
    if not tokens.exists():
        text = write_text(checkpoint, work / "calibration.jsonl")
        config = Checkpoint.open(checkpoint).config
        found = data.load(text, checkpoint, config, tokens=SEQUENCES * LENGTH, length=LENGTH, seed=0)
        np.savez(tokens, calibration=found.ids, heldout=np.stack(windows(checkpoint, LENGTH, count)))
    return {"plain": checkpoint, "variant": variant}, tokens


class Rows:
    """Measured rows of one model, kept in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.found: dict[str, Row] = {row["method"]: row for row in map(json.loads, lines)}

    def add(self, name: str, measure: Callable[[], Row]) -> Row:
        """The row of that name, measured unless it is there."""
        if name not in self.found:
            self.found[name] = {"method": name, **measure()}
            with self.path.open("a") as file:
                file.write(json.dumps(self.found[name]) + "\n")
        return self.found[name]


def our_rows(model: Path, rows: Rows, chosen: dict[str, calibration_ours.Case], tokens: Path, work: Path) -> list[Row]:
    ids = np.load(tokens)
    checkpoint, reference = Checkpoint.open(model), remembered(eager(model))

    def measure(case: calibration_ours.Case) -> Row:
        score, bits, seconds = calibration_ours.measured(checkpoint, case, ids["calibration"], work)
        return {
            "tool": "enginesmith",
            "bits": bits,
            "seconds": seconds,
            **compare(reference, score, list(ids["heldout"])),
        }

    return [rows.add(name, lambda case=case: measure(case)) for name, case in chosen.items()]  # type: ignore[misc]


def llama_rows(files: calibration_llama.LlamaFiles, rows: Rows, tokens: Path) -> Iterator[Row]:
    ids = np.load(tokens)
    reference = remembered(eager(files.checkpoint))
    for label in calibration_llama.KINDS:
        for whole in (False, True):

            def measure(label: str = label, whole: bool = whole) -> Row:
                path = files.quantized(label, ids["calibration"])
                score: Scorer = gguf_weights(files.checkpoint, path, whole=whole)
                bits = calibration_llama.bits(path)
                figures = compare(reference, score, list(ids["heldout"]))
                more = {"bits of table": bits["table"] if whole else 32.0, "types": bits["types"]}
                return {"tool": "llama.cpp", "bits": bits["layers"], "seconds": 0.0, **figures, **more}

            yield rows.add(f"llama.cpp {label}{' whole file' if whole else ''}", measure)


def peer_rows(python: Path, model: Path, tokens: Path, out: Path, chosen: list[str] | None) -> list[Row]:
    """The rows of calibration_peers.py, which runs in the peers' environment."""
    command = [str(python), "-m", "tests.benchmarks.calibration_peers", str(model), str(tokens), str(out)]
    subprocess.run([*command, *(["--methods", *chosen] if chosen else [])], check=True, env=dict(os.environ))
    return list(Rows(out).found.values())


def table_row(model: str, row: Row) -> Row:
    figures = {name: row[name] for name in FIGURES}
    return {"model": model, "method": row["method"], "bits": row["bits"], **figures, "seconds": row["seconds"]}


def write_csv(path: Path, table: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--group", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--recipes", nargs="*", help="rows of ours, as the table names them; default: all")
    parser.add_argument("--models", nargs="*", default=["plain", "variant"])
    parser.add_argument("--peers", nargs="+", choices=["llama.cpp", "quantizers"], default=[])
    parser.add_argument("--methods", nargs="*", help="rows of llm-compressor and modelopt; default: all")
    arguments = parser.parse_args()
    work: Path = arguments.work
    models, tokens = prepare(arguments.checkpoint, work, arguments.windows)
    cases = calibration_ours.cases(arguments.group)
    chosen = {name: cases[name] for name in arguments.recipes} if arguments.recipes is not None else cases
    table: list[Row] = []
    for label in arguments.models:
        kept = f"{label}-{arguments.windows}"
        found = our_rows(models[label], Rows(work / f"ours-{kept}.jsonl"), chosen, tokens, work)
        if "llama.cpp" in arguments.peers:
            programs = peer_setup.llama_cpp(work / "programs").resolve()
            files = calibration_llama.LlamaFiles(models[label], work, programs, label)
            found += llama_rows(files, Rows(work / f"llama-{kept}.jsonl"), tokens)
        if "quantizers" in arguments.peers:
            python = peer_setup.quantizers(work / "programs")
            found += peer_rows(python, models[label], tokens, work / f"peers-{kept}.jsonl", arguments.methods)
        table += [table_row(label, row) for row in found]
    write_csv(work / "quality.csv", table)
    show(f"Quality of calibrated recipes: {arguments.windows} windows of {LENGTH} tokens of held-out text", table)


if __name__ == "__main__":
    main()
