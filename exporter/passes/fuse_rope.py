"""x * cos + rotate_half(x) * sin becomes RotaryEmbedding with tables."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter.pattern import MatchResult, RewriteRule, RewriteRuleClassBase

from exporter.core.canonical import RotaryTable, Slice
from exporter.core.config import ModelConfig
from exporter.core.errors import BudgetError
from exporter.passes.editing import integers_of
from exporter.passes.rotary_angles import Rotation, read_rotation
from exporter.passes.rule import Context, Outcome, apply_rules

TABLES = {"cos": "rotary.cos_cache", "sin": "rotary.sin_cache"}


class Rope(RewriteRuleClassBase):
    """Rotary position embedding in halves (Su et al. 2021; ONNX RotaryEmbedding-23 with interleaved=0).

    Does not fire when the halves are not the two equal halves of the last axis, when the negated half is the
    first (rotation the other way), when pairs are interleaved, when cos and sin come from other angles or
    positions than position_ids, or when the tables of two applications differ.
    """

    def __init__(self, tables: dict[str, ir.Value]) -> None:
        super().__init__()
        self.tables = tables
        self.rotations: dict[str, Rotation] = {}

    def pattern(
        self, op: Any, x: Any, cos: Any, sin: Any, start1: Any, end1: Any, axes1: Any, steps1: Any,
        start2: Any, end2: Any, axes2: Any, steps2: Any,
    ) -> Any:  # fmt: skip
        first = op.Slice(x, start1, end1, axes1, steps1)
        second = op.Slice(x, start2, end2, axes2, steps2)
        rotated = op.Concat(op.Neg(second), first, axis=-1)
        return op.Add(op.Mul(x, cos), op.Mul(rotated, sin))

    def check(  # type: ignore[override]  # values are bound by name
        self, context: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **bounds: Any
    ) -> MatchResult:
        result = MatchResult()
        width = x.shape[3] if x.shape is not None and len(x.shape) == 4 else None
        if not isinstance(width, int):
            return result.fail("x is not known to be [B, heads, S, D]", x)
        for half, (low, high) in {"1": (0, width // 2), "2": (width // 2, width)}.items():
            if why := _not_half(width, low, high, *(bounds[name + half] for name in ("start", "end", "axes", "steps"))):
                return result.fail(why, x)
        for function, value in (("cos", cos), ("sin", sin)):
            rotation = read_rotation(value, function.capitalize())
            if isinstance(rotation, str):
                return result.fail(f"{function}: {rotation}", value)
            if self.rotations.setdefault(function, rotation) != rotation:
                return result.fail(f"{function}: another application uses other frequencies", value)
            if len(rotation.frequencies) != width // 2:
                return result.fail(f"{function}: {len(rotation.frequencies)} frequencies for width {width}", value)
        return result

    def rewrite(self, op: Any, x: ir.Value, **_: object) -> Any:
        positions = self.rotations["cos"].positions
        return op.RotaryEmbedding(x, self.tables["cos"], self.tables["sin"], positions, interleaved=0)


def _not_half(width: int, low: int, high: int, *bounds: ir.Value) -> str:
    start, end, axis, step = (integers_of(value) for value in bounds)
    good_end = end is not None and (end == [high] or (high == width and end[0] >= width))
    if start == [low] and good_end and axis in ([3], [-1]) and step == [1]:
        return ""
    return f"a half is {start}:{end}:{step} of axis {axis}, not {low}:{high} of the last"


def fuse_rope(piece: Slice, context: Context) -> Outcome:
    """Fuse the rotations of query and key; their tables become weights, computed from the graph's own frequencies."""
    graph = piece.structure.graph
    tables = {function: _table(name, context.config.head_dim // 2) for function, name in TABLES.items()}
    rule = Rope(tables)
    rules = [RewriteRule(rule.pattern, rule.rewrite, rule.check, name="fuse_rope")]
    outcome = apply_rules(piece.structure, rules, 2)
    if outcome.fired:
        for function, value in tables.items():
            graph.inputs.append(value)
            rotation = rule.rotations[function]
            _check_frequencies(rotation, context.config)
            piece.weights[TABLES[function]] = RotaryTable(
                function, rotation.frequencies, context.max_seq_len, rotation.scale
            )
    RemoveUnusedNodesPass()(piece.structure)
    return outcome


def _table(name: str, width: int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(["P", width]), type=ir.TensorType(ir.DataType.FLOAT))


def _check_frequencies(rotation: Rotation, config: ModelConfig) -> None:
    """The traced frequencies against those of config.json: equal up to the last bits of float32's pow."""
    expected = config.rope.inverse_frequencies(config.head_dim)
    found = np.array(rotation.frequencies, np.float32)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-6, atol=0):
        worst = int(np.argmax(np.abs(found - expected) / expected)) if found.shape == expected.shape else -1
        raise BudgetError(
            "fuse.rotary",
            f"rotary frequencies of the traced graph differ from config.json's (pair {worst}: {found[worst]} against "
            f"{expected[worst]})",
            "the installed transformers reads rope_parameters in another way; report the config",
        )
