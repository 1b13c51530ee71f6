"""x * sigmoid(x) becomes Swish."""

from typing import Any

from onnxscript.rewriter.pattern import RewriteRuleClassBase

from exporter.core.canonical import Slice
from exporter.passes.rule import Context, Outcome, apply_rules


class Swish(RewriteRuleClassBase):
    """SiLU, or Swish with alpha 1 (ONNX Swish-24).

    Does not fire when the sigmoid is of another value than the one it multiplies, nor for other gates (Relu, Gelu).
    """

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Mul(x, op.Sigmoid(x))

    def rewrite(self, op: Any, x: Any) -> Any:
        return op.Swish(x)


def fuse_swish(piece: Slice, context: Context) -> Outcome:
    """Fuse every SiLU of a slice."""
    return apply_rules(piece.structure, [Swish.rule()], 1)
