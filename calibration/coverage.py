"""What a recipe achieves on an architecture, from the config alone: actual precision of every matrix, and the gate."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from exporter.core.config import ModelConfig
from exporter.core.errors import BudgetError, InputError
from exporter.core.recipe import FIXED_GROUPS, GROUP_SIZES, TENSOR, Precision, Recipe

SOURCE = Precision("fp32")
AUTO = "auto"
AUTO_GROUPS = (128, 64, 32)
"""The recipe that chooses precisions itself, and the groups that its weights of 4 bits may have."""
PACKS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
"""Matrices of a layer that the canonical model stacks into one."""
FORMAT_SCALE_BITS = {"nvfp4": (8, 32), "mxfp4": (8, 0)}
"""Bits of a group's scale and of a matrix's own, where the format says so."""
MatrixBits = Callable[[Precision, int, int], int]
"""Bits of a matrix (precision, rows, width) where it is stored: codes, scales and zero points."""


def plain_matrix_bits(precision: Precision, rows: int, width: int, scale_bits: int = 32) -> int:
    """The size of the format itself, whoever stores it: every scale once, zero points packed as the codes are.

    `scale_bits`: of a scale that the format does not fix. Targets have `matrix_bits` of their own.
    """
    codes = rows * width * precision.bits
    if not precision.is_coded:
        return codes
    of_group, of_matrix = FORMAT_SCALE_BITS.get(precision.kind, (scale_bits, 0))
    groups = 1 if precision.group_size == TENSOR else rows * precision.groups(width)
    return codes + groups * (of_group + (0 if precision.symmetric else precision.bits)) + of_matrix


@dataclass(frozen=True)
class TensorCoverage:
    """One matrix [N, K]: what the recipe asks, what it gets, and why they differ (empty if they do not)."""

    name: str
    shape: tuple[int, int]
    requested: Precision
    actual: Precision
    why: str = ""

    @property
    def covered(self) -> bool:
        return self.actual == self.requested

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def stored_bits(self, matrix_bits: MatrixBits = plain_matrix_bits) -> int:
        """Bits of codes, scales and zero points where `matrix_bits` says how they are stored."""
        return matrix_bits(self.actual, *self.shape)


@dataclass(frozen=True)
class Coverage:
    """Every matrix of the model: decoder layers, head, embedding.

    `fraction` of their parameters that get what was asked; `bits_per_weight` over the checkpoint's matrices, scales
    and zero points included (a tied table stored in two precisions counts twice in bits, once in weights).
    """

    tensors: tuple[TensorCoverage, ...]
    fraction: float
    bits_per_weight: float

    def to_json(self) -> dict[str, object]:
        """The `coverage` object of `plan --json`."""
        return {
            "fraction": self.fraction,
            "bits_per_weight": self.bits_per_weight,
            "tensors": [
                {"name": t.name, "requested": t.requested.describe(), "actual": t.actual.describe(), "why": t.why}
                for t in self.tensors
            ],
        }


def prospective(config: ModelConfig, recipe: Recipe) -> Recipe:
    """A recipe before calibration. `auto` names groups of 128 and chooses smaller ones where those do not divide a
    width: it stands with the largest of its groups that divides them all, or the smallest. Others stay as they are."""
    if recipe.name != AUTO or recipe.linear.group_size not in AUTO_GROUPS:
        return recipe
    widths = {shape[1] for shape in config.linear_shapes.values()}
    fitting = (group for group in AUTO_GROUPS if all(width % group == 0 for width in widths))
    return replace(recipe, linear=replace(recipe.linear, group_size=next(fitting, AUTO_GROUPS[-1])))


def actual_precision(requested: Precision, width: int) -> Precision:
    """What a matrix with rows of `width` weights is stored in: fp32 where groups do not divide the width."""
    return requested if requested.divides(width) else SOURCE


def kernel_group(precision: Precision, width: int) -> int:
    """The group that kernels of CPU targets take for rows of `width`: the precision's own, or for a row of one scale
    the largest that divides it (the scale is repeated); 0 where none does."""
    if precision.group_size in GROUP_SIZES:
        return precision.group_of(width)
    return max((group for group in GROUP_SIZES if width % group == 0), default=0)


def check_layers(config: ModelConfig, recipe: Recipe) -> None:
    """Whether the recipe's overrides make sense on this architecture.

    InputError `recipe.overrides` names those that match no matrix, `recipe.packs` every matrix that is stacked with
    one of another precision: engines compute q, k and v in one product, and gate and up.
    """
    modules = [(layer, name) for layer in range(config.num_layers) for name in config.linear_shapes]
    unused = [each.pattern for each in recipe.overrides if not any(each.matches(*module) for module in modules)]
    if unused:
        raise InputError(
            "recipe.overrides",
            f"no matrix of the {config.num_layers} layers is matched by {', '.join(map(repr, unused))}",
            f"names are like layers.0.{next(iter(config.linear_shapes))}, with * for any part",
        )
    if faults := [fault for layer in range(config.num_layers) for fault in _pack_faults(layer, recipe)]:
        raise InputError(
            "recipe.packs",
            f"matrices that are computed together have different precisions: {'; '.join(faults)}",
            'give them one, as with [layers."*.self_attn.[qkv]_proj"] or [layers."*.mlp.*"]',
        )


def _pack_faults(layer: int, recipe: Recipe) -> Iterator[str]:
    for pack in PACKS:
        asked = {name: recipe.layer_precision(layer, name) for name in pack}
        if len(set(asked.values())) > 1:
            parts = ", ".join(f"{name} {precision.describe()}" for name, precision in asked.items())
            yield f"layers.{layer}: {parts}"


def coverage(config: ModelConfig, recipe: Recipe, matrix_bits: MatrixBits = plain_matrix_bits) -> Coverage:
    """What the recipe achieves on this architecture; `matrix_bits`, a target's: how large its engines are.

    Raises InputError where overrides make no sense (`check_layers`).
    """
    check_layers(config, recipe)
    hidden = config.hidden_size
    tensors = [_tensor("model.embed_tokens.weight", (config.vocab_size, hidden), recipe.embedding.weight_only)]
    for layer in range(config.num_layers):
        for name, shape in config.linear_shapes.items():
            asked = recipe.layer_precision(layer, name)
            tensors.append(_tensor(f"model.layers.{layer}.{name}.weight", shape, asked))
    tensors.append(_tensor("lm_head.weight", (config.head_size, hidden), recipe.lm_head))
    total = sum(t.parameters for t in tensors)
    covered = sum(t.parameters for t in tensors if t.covered)
    return Coverage(tuple(tensors), covered / total, _bits_per_weight(config, tensors, matrix_bits))


def gate(achieved: Coverage, min_coverage: float = 1.0) -> None:
    """Raise BudgetError (`coverage.missed`) naming every matrix left out, if too many are."""
    if achieved.fraction >= min_coverage:
        return
    missed = [t for t in achieved.tensors if not t.covered]
    counts = Counter((re.sub(r"\.\d+\.", ".*.", t.name.removesuffix(".weight")), t.why) for t in missed)
    modules = "; ".join(f"{name} ({why}), {_tensors(count)}" for (name, why), count in counts.items())
    widths = " and ".join(map(str, sorted({t.shape[1] for t in missed})))
    fixed = sorted({t.requested.kind for t in missed if t.requested.kind in FIXED_GROUPS})
    choose = f"choose a --group-size that divides {widths}"
    if fixed:
        choose = f"choose another precision than {' and '.join(fixed)}, whose groups do not divide {widths}"
    raise BudgetError(
        "coverage.missed",
        f"the recipe covers {achieved.fraction:.4%} of the weights, {min_coverage:.4%} asked. Left in fp32: {modules}",
        f"{choose}, or lower --min-coverage",
    )


def _tensor(name: str, shape: tuple[int, int], requested: Precision) -> TensorCoverage:
    actual = actual_precision(requested, shape[1])
    why = "" if actual == requested else f"K={shape[1]} not divisible by {requested.group_of(shape[1])}"
    return TensorCoverage(name, shape, requested, actual, why)


def _bits_per_weight(config: ModelConfig, tensors: list[TensorCoverage], matrix_bits: MatrixBits) -> float:
    embedding, head = tensors[0], tensors[-1]
    stored = sum(t.stored_bits(matrix_bits) for t in tensors)
    weights = sum(t.parameters for t in tensors)
    if config.tie_word_embeddings:
        weights -= head.parameters
        # What is asked of the head's input does not change its bytes.
        shared = head.actual.weight_only == embedding.actual.weight_only
        stored -= head.stored_bits(matrix_bits) if shared else 0
    return stored / weights


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"
