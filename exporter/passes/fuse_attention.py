"""softmax(q k^T * scale + mask) v, with keys and values repeated for groups of heads, becomes Attention."""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from exporter.core.canonical import Slice
from exporter.passes.editing import integers_of, scalar_of
from exporter.passes.rule import Context, Outcome, apply_rules


class _Attention(RewriteRuleClassBase):
    """Scaled dot-product attention with an additive mask (Vaswani et al. 2017, eq. 1; ONNX Attention-24).

    Does not fire when the scale is not one constant applied to the scores before the mask, when the softmax is over
    another axis than keys, when what is added to the scores is not the slice's attention_mask, or when keys and
    values are not [B, heads, T, D] with heads that divide the query's.
    """

    def attend(self, op: Any, q: Any, k: Any, v: Any, scale: Any, mask: Any) -> Any:
        scores = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), scale)
        return op.MatMul(op.Softmax(op.Add(scores, mask), axis=-1), v)

    def check_scores(self, q: ir.Value, scale: ir.Value, mask: ir.Value) -> MatchResult:
        result = MatchResult()
        if not (scalar_of(scale) or 0) > 0:
            return result.fail("the scale is not a positive constant", scale)
        if mask.name != "attention_mask" or not mask.is_graph_input():
            return result.fail("what is added to the scores is not attention_mask", mask)
        if q.shape is None or len(q.shape) != 4:
            return result.fail("the query is not known to be [B, heads, S, D]", q)
        return result

    def rewrite(
        self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, scale: ir.Value, mask: ir.Value, **_: object
    ) -> Any:
        return op.Attention(q, k, v, mask, scale=scalar_of(scale))


class GroupedAttention(_Attention):
    """Grouped-query attention: a key and value head serves a group of neighbouring query heads (Ainslie et al. 2023).

    Does not fire, besides, when heads are repeated in another order than head 0, 0, ..., 1, 1, ...
    """

    def pattern(
        self, op: Any, q: Any, k: Any, v: Any, scale: Any, mask: Any, k_axis: Any, k_times: Any, k_heads: Any,
        v_axis: Any, v_times: Any, v_heads: Any,
    ) -> Any:  # fmt: skip
        keys = op.Reshape(op.Expand(op.Unsqueeze(k, k_axis), k_times), k_heads)
        values = op.Reshape(op.Expand(op.Unsqueeze(v, v_axis), v_times), v_heads)
        return self.attend(op, q, keys, values, scale, mask)

    def check(  # type: ignore[override]  # values are bound by name
        self, context: Any, q: ir.Value, k: ir.Value, v: ir.Value, scale: ir.Value, mask: ir.Value, **repeats: ir.Value
    ) -> MatchResult:
        result = self.check_scores(q, scale, mask)
        if not result:
            return result
        for part, value in (("k", k), ("v", v)):
            if why := _not_repeated(q, value, *(repeats[f"{part}_{name}"] for name in ("axis", "times", "heads"))):
                return result.fail(f"{part}: {why}", value)
        return result


class PlainAttention(_Attention):
    """Multi-head attention: as many key and value heads as query heads, none repeated."""

    def pattern(self, op: Any, q: Any, k: Any, v: Any, scale: Any, mask: Any) -> Any:
        return self.attend(op, q, k, v, scale, mask)

    def check(  # type: ignore[override]  # values are bound by name
        self, context: Any, q: ir.Value, k: ir.Value, v: ir.Value, scale: ir.Value, mask: ir.Value, **_: object
    ) -> MatchResult:
        result = self.check_scores(q, scale, mask)
        if not result:
            return result
        for value in (k, v):
            if value.shape is None or len(value.shape) != 4 or q.shape is None or value.shape[1] != q.shape[1]:
                return result.fail("keys or values have other heads than the query", value)
            producer = value.producer()
            if producer is not None and producer.op_type == "Reshape":
                return result.fail("keys or values are repeated in an order that is not grouped-query attention", value)
        return result


def _not_repeated(q: ir.Value, value: ir.Value, axis: ir.Value, times: ir.Value, heads: ir.Value) -> str:
    """Whether [B, Hkv, T, D] -> [B, Hkv, G, T, D] -> [B, Hkv * G, T, D] is how the heads are repeated."""
    if value.shape is None or len(value.shape) != 4 or not isinstance(value.shape[1], int):
        return "it is not known to be [B, heads, T, D]"
    if integers_of(axis) != [2]:
        return f"heads are repeated at axis {integers_of(axis)}, not after each head"
    target, repeats = integers_of(heads), integers_of(times)
    if repeats is None or len(repeats) != 5 or [*repeats[:2], *repeats[3:]] != [1, 1, 1, 1]:
        return f"heads are repeated {repeats} times"
    query_heads = q.shape[1] if q.shape is not None else None
    if target is None or target[1] != query_heads or value.shape[1] * repeats[2] != query_heads:
        return f"{value.shape[1]} heads times {repeats[2]} do not make the query's {query_heads}"
    return "" if target[3:] == [value.shape[3]] else f"the repeated heads are reshaped to {target}"


def fuse_attention(piece: Slice, context: Context) -> Outcome:
    """Fuse attention into one operator that reads keys and values unrepeated, the mask still an input."""
    return apply_rules(piece.structure, [GroupedAttention.rule(), PlainAttention.rule()], 1)
