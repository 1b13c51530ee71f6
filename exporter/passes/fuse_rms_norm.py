"""x / sqrt(mean(x^2) + epsilon) * weight becomes RMSNormalization."""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from exporter.core.canonical import Slice
from exporter.passes.editing import integers_of, scalar_of, shortest_float
from exporter.passes.rule import Context, Outcome, apply_rules


class RmsNorm(RewriteRuleClassBase):
    """Root mean square normalisation over the last axis (Zhang & Sennrich 2019, eq. 4; ONNX RMSNormalization-23).

    Does not fire for another exponent than 2, a mean over other axes than the last, an epsilon that is no
    positive constant, a weight that is not one vector, or when x has its mean subtracted first (LayerNorm:
    then the normalised value is not the value that is squared).
    """

    def pattern(self, op: Any, x: Any, exponent: Any, axes: Any, epsilon: Any, weight: Any) -> Any:
        mean = op.ReduceMean(op.Pow(x, exponent), axes, keepdims=1)
        inverse = op.Reciprocal(op.Sqrt(op.Add(mean, epsilon)))
        return op.Mul(op.Mul(x, inverse), weight)

    def check(  # type: ignore[override]  # values are bound by name
        self,
        context: Any,
        x: ir.Value,
        exponent: ir.Value,
        axes: ir.Value,
        epsilon: ir.Value,
        weight: ir.Value,
        **_: object,
    ) -> MatchResult:
        result = MatchResult()
        if scalar_of(exponent) != 2.0:
            return result.fail("the exponent is not 2", exponent)
        last = len(x.shape) - 1 if x.shape is not None else -1
        if integers_of(axes) not in ([-1], [last]):
            return result.fail(f"the mean is over axes {integers_of(axes)}, not over the last", axes)
        if not 0 < (scalar_of(epsilon) or 0) < 1:
            return result.fail("epsilon is not a positive constant below one", epsilon)
        if weight.shape is None or len(weight.shape) != 1:
            return result.fail("the weight is not one vector", weight)
        return result

    def rewrite(self, op: Any, x: ir.Value, epsilon: ir.Value, weight: ir.Value, **_: object) -> Any:
        value = scalar_of(epsilon)
        assert value is not None
        return op.RMSNormalization(x, weight, axis=-1, epsilon=shortest_float(value))


def fuse_rms_norm(piece: Slice, context: Context) -> Outcome:
    """Fuse every RMS norm of a slice."""
    return apply_rules(piece.structure, [RmsNorm.rule()], 2 if piece.kind == "layer" else 1)
