"""Causal attention over the KV cache, for single tokens of many rows and for whole prompts, in one kernel."""

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from targets.tvm.isa import Isa
from targets.tvm.kernels.attention_decode import decode
from targets.tvm.kernels.attention_plan import Operands, Plan
from targets.tvm.kernels.attention_prefill import prefill
from targets.tvm.kernels.cache_format import BLOCK
from targets.tvm.kernels.ir import arguments, kernel, size
from targets.tvm.tuning import DEFAULT, Tuning


def attention(
    isa: Isa, name: str, heads: int, kv_heads: int, head_dim: int, kind: str, tuning: Tuning = DEFAULT
) -> tirx.PrimFunc:
    """q float32 [T, heads * D], segments int32 [R, 4], key, value, (key_scale, value_scale) -> y [T, heads * D].

    A segment is (cache row, first token, tokens, past length); its token i sees past + i + 1 positions. q is scaled so
    that 2^(q.k) are the weights. What cache cells beyond hold does not matter. A token of no segment keeps its y.
    ValueError when kv_heads does not divide heads.
    """
    plan = Plan.of(isa, heads, kv_heads, head_dim, kind)
    tokens, count, rows, blocks = size("tokens"), size("segment_count"), size("rows"), size("blocks")
    scales = ("key_scale", "value_scale") if plan.kind.scaled else ()
    with kernel(name) as finished:
        q, segments, key, value, *scaled, y = arguments(
            q=((tokens, heads * head_dim), "float32"),
            segments=((count, 4), "int32"),
            key=((rows, kv_heads, blocks, head_dim, BLOCK), plan.kind.dtype),
            value=((rows, kv_heads, blocks * BLOCK, plan.width), plan.kind.dtype),
            **dict.fromkeys(scales, ((rows, kv_heads, blocks * BLOCK), "float32")),
            y=((tokens, heads * head_dim), "float32"),
        )
        operands = Operands(plan, q, segments, key, value, tuple(scaled), y, count, blocks)
        threads = T.bind(T.cast(T.call_packed("runtime.NumThreads"), "int64"))
        with T.If(tokens == count):
            with T.Then():
                decode(operands, threads)
            with T.Else():
                prefill(operands, threads, tuning.queries)
    return finished()
