"""The recipe `auto`: a precision for every unit of a model, chosen by measured sensitivity within a budget.

Units, and what each costs at each candidate precision, come from calibration.sensitivity; the choice from
calibration.allocation. Budgets: bits per weight over all matrices, bytes of all weights, or mean KL against the model,
as expected on the calibration text.

Costs are measured of weights rounded to nearest, under a scale where AWQ is one of the recipe's algorithms. What GPTQ
leaves of them differs: a third of a layer's, more of the head's, and all of the embedding's, which is rounded to
nearest in any case. GAINS are those of the example model (docs/benchmarks.md); without them a budget goes where GPTQ
needs none of it.

Sizes count codes and a float16 scale for each group, as target `tvm` stores them. Head and embedding that are one
matrix get one precision, so that one table serves both.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calibration.activation_store import ActivationStore
from calibration.allocation import Allocation, Choice, within_bits, within_divergence
from calibration.coverage import plain_matrix_bits
from calibration.data import CalibrationData
from calibration.presets import parse_precision
from calibration.sensitivity import Unit, measure
from exporter.core.checkpoint import Checkpoint
from exporter.core.progress import Progress
from exporter.core.recipe import Override, Precision, Recipe

NAME = "auto"
CANDIDATES = (
    *(Precision("int4", group) for group in (128, 64, 32)),
    *(Precision("int6", group) for group in (128, 32)),
    Precision("int8", 128),
)
DEFAULT_BITS = 4.5
SCALE_BITS = 16
SEQUENCES, LENGTH = 8, 256
MEMORY = 512 << 20
GAINS = {("awq", "gptq"): {"layers": 0.4, "head": 0.6}, ("gptq",): {"layers": 0.3, "head": 0.6}}
"""Algorithms -> what they leave of the measured costs. With AWQ layers are measured under a scale already."""
PATTERNS = {
    "attention_input": ("self_attn.[qkv]_proj",),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_hidden": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class AutoBudget:
    """At most one is given: bits per weight with scales, bytes of all weights, or mean KL to the original. None: 4.5
    bits per weight."""

    target_bits: float | None = None
    target_bytes: int | None = None
    max_kl: float | None = None

    @property
    def given(self) -> bool:
        return any(value is not None for value in (self.target_bits, self.target_bytes, self.max_kl))


@dataclass(frozen=True)
class AutoChoice:
    """The recipe that was found, and why: for each unit its precision, its bits and its expected KL."""

    recipe: Recipe
    bits_per_weight: float
    expected_kl: float
    units: Mapping[str, Choice]

    def to_json(self) -> dict[str, object]:
        """For reports."""
        units = {
            name: {"precision": choice.name, "bits": choice.bits, "expected_kl": choice.divergence}
            for name, choice in self.units.items()
        }
        return {"bits_per_weight": self.bits_per_weight, "expected_kl": self.expected_kl, "units": units}


def resolve(
    checkpoint: Checkpoint, recipe: Recipe, data: CalibrationData, budget: AutoBudget, progress: Progress
) -> AutoChoice:
    """The recipe with a precision for every unit, within the budget; measured on the first sequences of `data`.

    `checkpoint` is the source with its rotations. Raises BudgetError (`auto.size`, `auto.quality`) where nothing fits.
    """
    sample = data.ids[:SEQUENCES, :LENGTH]
    with tempfile.TemporaryDirectory(prefix="enginesmith-auto-") as folder:
        store = ActivationStore(Path(folder), MEMORY)
        scaled = "awq" in recipe.algorithms
        units = measure(checkpoint, sample, CANDIDATES, store, progress.advance, scaled=scaled)
    return choose(checkpoint, recipe, units, budget)


def choose(checkpoint: Checkpoint, recipe: Recipe, units: Sequence[Unit], budget: AutoBudget) -> AutoChoice:
    """The recipe from measured units."""
    weights = sum(_parameters(checkpoint, name) for name in checkpoint.tensors)
    left = [_after(unit, recipe.algorithms) for unit in units]
    found = _allocate(checkpoint, _choices(checkpoint, left), budget, weights)
    return AutoChoice(_recipe(recipe, found), found.bits / weights, found.divergence, found.chosen)


def _after(unit: Unit, algorithms: Sequence[str]) -> Unit:
    """The unit with what the algorithms leave of its costs."""
    gains = next((gains for names, gains in GAINS.items() if set(names) <= set(algorithms)), {})
    gain = gains.get(unit.name.split(".")[0], 1.0)
    return replace(unit, divergences={precision: gain * cost for precision, cost in unit.divergences.items()})


def _choices(checkpoint: Checkpoint, units: Sequence[Unit]) -> dict[str, list[Choice]]:
    """What each unit may be stored in; a tied head and embedding become the unit `tables`."""
    by_name = {unit.name: unit for unit in units}
    if checkpoint.config.tie_word_embeddings:
        head, embedding = by_name.pop("head"), by_name.pop("embedding")
        both = {p: head.divergences[p] + embedding.divergences[p] for p in head.divergences}
        by_name["tables"] = Unit("tables", embedding.tensors, both)
    return {
        name: [Choice(p.describe(), _bits(checkpoint, unit, p), cost) for p, cost in unit.divergences.items()]
        for name, unit in by_name.items()
    }


def _allocate(
    checkpoint: Checkpoint, choices: Mapping[str, Sequence[Choice]], budget: AutoBudget, weights: int
) -> Allocation:
    if budget.max_kl is not None:
        return within_divergence(choices, budget.max_kl)
    if budget.target_bytes is not None:
        vectors = sum(32 * info.shape[0] for info in checkpoint.tensors.values() if len(info.shape) == 1)
        return within_bits(choices, 8 * budget.target_bytes - vectors)
    return within_bits(choices, (budget.target_bits or DEFAULT_BITS) * weights)


def _recipe(recipe: Recipe, found: Allocation) -> Recipe:
    """The most common precision for `linear`, overrides for layers that differ."""
    chosen = {name: parse_precision(choice.name) for name, choice in found.chosen.items()}
    layers = {name: precision for name, precision in chosen.items() if name.startswith("layers.")}
    linear = Counter(layers.values()).most_common(1)[0][0]
    overrides = []
    for name, precision in layers.items():
        layer, _, point = name.rpartition(".")
        if precision != linear:
            overrides += [Override(f"{layer}.{pattern}", precision) for pattern in PATTERNS[point]]
    head = chosen["tables"] if "tables" in chosen else chosen["head"]
    embedding = chosen["tables"] if "tables" in chosen else chosen["embedding"]
    return replace(recipe, linear=linear, lm_head=head, embedding=embedding, overrides=tuple(overrides))


def _bits(checkpoint: Checkpoint, unit: Unit, precision: Precision) -> float:
    """Codes, scales and zero points of a unit's matrices. A tied head lies under the embedding's name."""
    sources = (name if name in checkpoint.tensors else checkpoint.config.head_source for name in unit.tensors)
    return sum(plain_matrix_bits(precision, *_matrix(checkpoint, source), SCALE_BITS) for source in sources)


def _matrix(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    rows, width = checkpoint.tensors[name].shape
    return rows, width


def _parameters(checkpoint: Checkpoint, name: str) -> int:
    shape = checkpoint.tensors[name].shape
    return shape[0] * shape[1] if len(shape) == 2 else 0
