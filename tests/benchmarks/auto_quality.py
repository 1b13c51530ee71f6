"""The recipe `auto` beside every uniform recipe of its size: divergence of whole models, head and embedding included.

    python -m tests.benchmarks.auto_quality examples/stdlib-llama --work DIR [--bits 4.5] [--windows 16]

Bits per weight count every matrix, a tied table once, and a float16 scale for each group. Uniform recipes have one
format everywhere. Text and windows are those of calibration_quality.py.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.auto import AutoBudget
from calibration.calibrate import CalibrateOptions, calibrate
from calibration.coverage import coverage
from calibration.presets import preset
from calibration.qparams import QParams
from exporter.core.checkpoint import Checkpoint
from exporter.core.progress import NoProgress
from exporter.core.recipe import Precision, Recipe
from tests.benchmarks import calibration_ours
from tests.benchmarks.calibration_peers import remembered
from tests.benchmarks.calibration_quality import prepare
from tests.benchmarks.quality import compare, eager
from tests.benchmarks.report import show


def uniform(kind: str, group: int, *algorithms: str) -> Recipe:
    precision = Precision(kind, group)
    name = "-".join([precision.describe().replace("/", " "), *algorithms])
    return Recipe(name, precision, precision, precision, algorithms=algorithms)


UNIFORM = (
    uniform("int4", 32),
    uniform("int4", 32, "awq"),
    uniform("int4", 32, "gptq"),
    uniform("int4", 32, "awq", "gptq"),
    uniform("int4", 64, "awq", "gptq"),
    uniform("int4", 128, "awq", "gptq"),
    uniform("nvfp4", 16),
    uniform("nf4", 32),
)


def auto_row(checkpoint: Checkpoint, algorithms: tuple[str, ...], bits: float, ids: np.ndarray, work: Path) -> Any:
    """What `auto` finds and how long it takes: (recipe, parameters, seconds)."""
    begun = time.perf_counter()
    recipe = replace(preset("auto"), algorithms=algorithms)
    out = work / f"auto-{'-'.join(algorithms)}-{bits}-{checkpoint.digest[:8]}.safetensors"
    if out.exists():
        found = QParams.open(out)
        return found.recipe, found, 0.0
    options = CalibrateOptions(budget=AutoBudget(target_bits=bits))
    found = calibrate(checkpoint, recipe, calibration_ours.data_of(ids), out, options, NoProgress())
    return found.recipe, found, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--models", nargs="*", default=["plain", "variant"])
    arguments = parser.parse_args()
    models, tokens = prepare(arguments.checkpoint, arguments.work, arguments.windows)
    arrays = np.load(tokens)
    ids, heldout = arrays["calibration"], list(arrays["heldout"])
    for label in arguments.models:
        checkpoint = Checkpoint.open(models[label])
        reference = remembered(eager(models[label]))
        table: list[dict[str, Any]] = []

        def add(name: str, recipe: Recipe, parameters: Any, seconds: float) -> None:
            numbers = calibration_ours.numbers_of(checkpoint, calibration_ours.Case(recipe), parameters)  # noqa: B023
            row = compare(reference, calibration_ours.scorer(numbers, recipe), heldout)  # noqa: B023
            bits = coverage(checkpoint.config, recipe, calibration_ours.matrix_bits).bits_per_weight  # noqa: B023
            table.append({"recipe": name, "bits": bits, **row, "seconds": seconds})  # noqa: B023
            print(table[-1], flush=True)  # noqa: B023

        for algorithms in (("awq", "gptq"), ("gptq",)):
            recipe, found, seconds = auto_row(checkpoint, algorithms, arguments.bits, ids, arguments.work)
            add(f"auto {'-'.join(algorithms)}", recipe, found, seconds)
        for recipe in UNIFORM:
            if (
                bits := coverage(checkpoint.config, recipe, calibration_ours.matrix_bits).bits_per_weight
            ) > arguments.bits + 0.01:
                print(f"{recipe.name} takes {bits:.2f} bits: left out")
                continue
            parameters, seconds = calibration_ours.parameters_of(checkpoint, recipe, ids, arguments.work)
            add(recipe.name, recipe, parameters, seconds)
        show(f"auto at {arguments.bits} bits, {label} model, {sum(len(w) - 1 for w in heldout)} positions", table)


if __name__ == "__main__":
    main()
