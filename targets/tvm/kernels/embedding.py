"""Embedding lookup: single rows out of a packed matrix, so that a tied output head needs no second copy."""

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from exporter.core.recipe import Precision
from targets.tvm.isa import Isa
from targets.tvm.kernels.ir import Expr, Registers, arguments, broadcast, int_vector, kernel, load, size, store
from targets.tvm.kernels.norm import few_or_many
from targets.tvm.kernels.vector import Vectors
from targets.tvm.packing import Layout, layout

WORD = 4
"""Columns whose codes lie side by side: an embedding row is read word by word."""


def embedding_int(isa: Isa, name: str, precision: Precision, rows: int, width: int) -> tirx.PrimFunc:
    """ids int32 [T], weights uint8 (packed [rows, K]) -> hidden float32 [T, K]: (code - zero point) * scale."""
    packed, tokens = layout(precision, rows, width, isa), size("t")
    with kernel(name) as finished:
        ids, weights, hidden = arguments(
            ids=((tokens,), "int32"),
            weights=(packed.shape, packed.dtype),
            hidden=((tokens, width), "float32"),
        )

        def one_row(token: Expr) -> None:
            row = T.bind(T.cast(ids[token], "int64"))
            lane, vector = T.bind(row % isa.lanes), T.bind(row % packed.step // isa.lanes)
            scales = Registers("float32", isa.lanes, 1)
            with T.serial(0, packed.groups) as group:
                record = T.bind((row // packed.step * packed.groups + group) * packed.record)
                at = record + packed.scales_at + vector * (2 * isa.lanes)
                scales[0] = Vectors(isa).half_from_bytes(weights, at)
                scale = T.bind(scales.buffer[lane])
                zero: Expr = packed.zero
                if not precision.symmetric:
                    stored = weights[record + packed.zeros_at + vector * isa.lanes + lane]
                    zero = T.bind(T.cast(stored, "int32") + packed.zero)
                codes = T.bind(record + vector * packed.vector_bytes + lane * 4)
                _group(packed, weights, codes, zero, scale, hidden, token * width + group * packed.group)

        few_or_many(tokens, one_row)
    return finished()


def _group(packed: Layout, weights: Expr, codes: Expr, zero: Expr, scale: Expr, hidden: Expr, target: Expr) -> None:
    """One row of one record: words of codes from `codes` on, values float32 to `target`."""
    columns = 32 // packed.precision.bits
    with T.serial(0, packed.group // columns) as chunk:
        stored = load(weights, codes + chunk * (2 * packed.vector_bytes), 4)
        if packed.precision.kind == "int4":
            wide = T.cast(stored, f"int32x{WORD}")
            parts = [T.bitwise_and(wide, int_vector(15, WORD)), T.shift_right(wide, int_vector(4, WORD))]
        else:
            stored = stored if packed.int8_offset else T.reinterpret("int8x4", stored)
            parts = [T.cast(stored, f"int32x{WORD}")]
        for number, part in enumerate(parts):
            value = T.cast(part - broadcast(T.cast(zero, "int32"), WORD), f"float32x{WORD}") * broadcast(scale, WORD)
            store(hidden, target + chunk * columns + number * WORD, value, WORD)


def embedding_float(isa: Isa, name: str, kind: str, rows: int, width: int) -> tirx.PrimFunc:
    """ids int32 [T], weights (packed [rows, K] of fp32, bf16 as uint16, fp16) -> hidden float32 [T, K]."""
    packed, tokens = layout(Precision(kind), rows, width, isa), size("t")
    with kernel(name) as finished:
        ids, weights, hidden = arguments(
            ids=((tokens,), "int32"),
            weights=(packed.shape, packed.dtype),
            hidden=((tokens, width), "float32"),
        )

        def one_row(token: Expr) -> None:
            row = T.bind(T.cast(ids[token], "int64"))
            lane = T.bind(row % isa.lanes)
            start = T.bind(row // packed.step * (width * packed.step) + row % packed.step - lane)
            values = Registers("float32", isa.lanes, 1)
            with T.serial(0, width) as column:
                values[0] = load_floats(Vectors(isa), kind, weights, start + column * packed.step)
                store(hidden, token * width + column, values.buffer[lane], 1)

        few_or_many(tokens, one_row)
    return finished()


def load_floats(vectors: Vectors, kind: str, weights: Expr, first: Expr) -> Expr:
    """A float32 vector of consecutive stored values of a float precision."""
    if kind == "bf16":
        return vectors.load_bfloat(weights, first)
    return vectors.load_half(weights, first) if kind == "fp16" else load(weights, first, vectors.lanes)
