"""What fp8 costs, by what is rounded and how, and how often its gate would fail by chance.

    python -m tests.benchmarks.calibration_fp8 examples/stdlib-llama --work DIR [--windows 40] [--rows NAME ...]
        [--calibrations 1:0:8192 2:1:8192 ...]

Each row is calibrated on each calibration (seed of the text : seed of the sampling : tokens) and measured twice, as the
eager model with its weights and inputs rounded: on the positions that the quantize stage of a build is gated on, and on
windows of held-out text. Those are cut into pieces of as many positions: `above 1.01` is the share of pieces whose
perplexity ratio misses the limit of fp8, all on the same engine.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from calibration import data
from calibration.presets import preset
from exporter.core.checkpoint import Checkpoint
from exporter.core.recipe import Override, Precision, Recipe
from exporter.parity.inputs import ParityInputs, parity_inputs
from exporter.parity.limits import FP8
from exporter.parity.scoring import Scored, scored_positions
from tests.benchmarks.calibration_ours import Case, numbers_of, parameters_of, scorer
from tests.benchmarks.calibration_text import write_text
from tests.benchmarks.quality import Scorer, log_softmax, windows
from tests.benchmarks.report import show

LENGTH, MAX_SEQ_LEN = 512, 1024
CALIBRATIONS = ("1:0:8192", "2:1:8192", "3:2:8192", "4:3:8192", "1:0:65536")
Figures = dict[str, float]


def rows() -> dict[str, Recipe]:
    """Every way to round that was tried, by its name."""
    fp8, channel, bf16 = preset("fp8"), preset("fp8-channel"), Precision("bf16")
    plain = replace(fp8, overrides=())

    def observed(rule: str) -> Recipe:
        return replace(plain, options=replace(plain.options, observer=rule))

    def without(recipe: Recipe, *patterns: str) -> Recipe:
        return replace(recipe, overrides=tuple(Override(pattern, bf16) for pattern in patterns))

    return {
        "every layer": plain,
        "every layer, weights alone": replace(plain, linear=plain.linear.weight_only),
        "every layer, inputs clipped by mse": observed("mse"),
        "every layer, inputs clipped by percentile": observed("percentile"),
        "every layer, inputs clipped by entropy": observed("entropy"),
        "every layer, GPTQ": replace(plain, algorithms=("gptq",)),
        "all but attention": without(plain, "*.self_attn.*"),
        "all but down_proj": without(plain, "*.mlp.down_proj"),
        "all but the first layer's mlp": without(plain, "layers.0.mlp.*"),
        "fp8: all but the first layer": fp8,
        "all but the first layer, GPTQ": replace(fp8, algorithms=("gptq",)),
        "fp8-channel: every layer": channel,
        "fp8-channel, all but the first layer": without(channel, "layers.0.*"),
    }


@dataclass(frozen=True)
class Text:
    """Positions to measure: rows of ids, and which of their positions count."""

    ids: list[np.ndarray]
    positions: list[np.ndarray]

    def differences(self, exact: Scorer, rounded: Scorer) -> tuple[np.ndarray, np.ndarray]:
        """Of each position: KL, and log p(what follows) of the exact model less that of the rounded one."""
        parts = [self._row(*row, exact, rounded) for row in zip(self.ids, self.positions, strict=True)]
        divergence, loss = (np.concatenate(part) for part in zip(*parts, strict=True))
        return divergence, loss

    def _row(self, ids: np.ndarray, at: np.ndarray, exact: Scorer, rounded: Scorer) -> tuple[np.ndarray, np.ndarray]:
        expected, found = (log_softmax(score(ids)[at]) for score in (exact, rounded))
        following = np.append(ids[1:], -1)[at]
        known = following >= 0
        divergence = (np.exp(expected) * (expected - found)).sum(axis=-1)
        return divergence, (expected - found)[np.arange(len(at)), following][known]


def gated(inputs: ParityInputs) -> Text:
    """What the stages of a build are measured on (exporter.parity.track)."""
    scored = [each for each in scored_positions(inputs) if each.group != "tail"]
    return Text([_up_to(inputs, each) for each in scored], [each.positions for each in scored])


def _up_to(inputs: ParityInputs, scored: Scored) -> np.ndarray:
    """The row as far as the last position and what follows it."""
    return inputs.rows[scored.row][: int(scored.positions[-1]) + 2]


def heldout(checkpoint: Path, count: int) -> Text:
    ids = windows(checkpoint, LENGTH, count)
    return Text(ids, [np.arange(len(row) - 1) for row in ids])


def pieces(loss: np.ndarray, size: int) -> np.ndarray:
    """Perplexity ratios of pieces of `size` positions."""
    whole = len(loss) // size * size
    ratios: np.ndarray = np.exp(loss[:whole].reshape(-1, size).mean(axis=1))
    return ratios


def figures(gate: Text, text: Text, exact: Scorer, rounded: Scorer) -> Figures:
    divergence, loss = gate.differences(exact, rounded)
    more, longer = text.differences(exact, rounded)
    parts = pieces(longer, len(loss))
    return {
        "gate KL": float(divergence.mean()),
        "gate ratio": float(np.exp(loss.mean())),
        "KL": float(more.mean()),
        "ratio": float(np.exp(longer.mean())),
        "scatter of pieces": float(parts.std()),
        "above 1.01": float((parts > FP8.perplexity_ratio).mean()),
    }


def measured(
    directory: Path, work: Path, chosen: dict[str, Recipe], calibrations: list[str], count: int
) -> Iterator[dict[str, object]]:
    checkpoint = Checkpoint.open(directory)
    gate, text = gated(parity_inputs(directory, checkpoint.config, MAX_SEQ_LEN)), heldout(directory, count)
    fp32 = Case(preset("fp32"))
    exact = scorer(numbers_of(checkpoint, fp32, None), fp32.recipe)
    for name, recipe in chosen.items():
        for calibration in calibrations if recipe.calibrated else [""]:
            parameters = None
            if calibration:
                documents, seed, tokens = map(int, calibration.split(":"))
                file = write_text(directory, work / f"text-{documents}.jsonl", seed=documents)
                found = data.load(file, directory, checkpoint.config, tokens=tokens, length=LENGTH, seed=seed)
                parameters, _ = parameters_of(checkpoint, recipe, found.ids, work)
            case = Case(recipe)
            rounded = scorer(numbers_of(checkpoint, case, parameters), recipe)
            yield {"row": name, "calibration": calibration, **figures(gate, text, exact, rounded)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--rows", nargs="*", help="rows by name; default: all")
    parser.add_argument("--calibrations", nargs="*", default=CALIBRATIONS[:1])
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    chosen = {name: recipe for name, recipe in rows().items() if arguments.rows is None or name in arguments.rows}
    found = measured(arguments.checkpoint, arguments.work, chosen, arguments.calibrations, arguments.windows)
    show(f"FP8 on {arguments.windows} windows of {LENGTH} tokens", list(found))


if __name__ == "__main__":
    main()
