"""Embedding lookup: single rows out of a packed matrix, so that a tied output head needs no second copy."""

from collections.abc import Callable

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from exporter.core.number_formats import decode_table
from exporter.core.recipe import Precision
from targets.tvm.formats import E2M1, TABLED, float_precision
from targets.tvm.isa import Isa
from targets.tvm.kernels.ir import Expr, Registers, arguments, broadcast, int_vector, kernel, load, size, store
from targets.tvm.kernels.norm import few_or_many
from targets.tvm.kernels.vector import Vectors
from targets.tvm.kernels.weight_scales import record_scales, row_factor
from targets.tvm.packing import Layout, layout

WORD, FLOATS = 4, "float32x4"
"""Columns whose codes lie side by side: an embedding row is read word by word."""


def embedding_int(isa: Isa, name: str, precision: Precision, rows: int, width: int) -> tirx.PrimFunc:
    """ids int32 [T], weights uint8 (packed [rows, K]) -> hidden float32 [T, K]: (code - zero point) * scale, or what
    the code stands for times the scale."""
    packed = layout(precision, rows, width, isa)

    def one_row(row: Expr, weights: Expr, hidden: Expr, target: Expr) -> None:
        lane, vector = T.bind(row % isa.lanes), T.bind(row % packed.step // isa.lanes)
        scales = Registers("float32", isa.lanes, 1)
        factor = row_factor(packed, weights, row)
        table = _Values(packed) if packed.kind in TABLED else None
        with T.serial(0, packed.groups) as group:
            record = T.bind(row // packed.step * packed.block_bytes + group * packed.record)
            scales[0] = record_scales(Vectors(isa), packed, weights, record, vector)
            scale = T.bind(scales.buffer[lane] * factor)
            zero: Expr = 0 if table else packed.zero
            if not precision.symmetric:
                stored = weights[record + packed.zeros_at + vector * isa.lanes + lane]
                zero = T.bind(T.cast(stored, "int32") + packed.zero)
            codes = T.bind(record + vector * packed.vector_bytes + lane * 4)
            _group(packed, weights, codes, table, zero, scale, hidden, target + group * packed.group)

    return lookup(name, packed, one_row)


def _group(
    packed: Layout,
    weights: Expr,
    codes: Expr,
    table: "_Values | None",
    zero: Expr,
    scale: Expr,
    hidden: Expr,
    target: Expr,
) -> None:
    """One row of one record: words of codes from `codes` on, values float32 to `target`."""
    with T.serial(0, packed.group // packed.chunk) as chunk:
        words = [
            load(weights, codes + chunk * packed.chunk_bytes + number * (2 * packed.vector_bytes), WORD)
            for number in range(packed.vectors)
        ]
        for number, part in enumerate(_stored_codes(packed, words)):
            value = table.of(part) if table else T.cast(part - broadcast(T.cast(zero, "int32"), WORD), FLOATS)
            store(hidden, target + chunk * packed.chunk + number * WORD, value * broadcast(scale, WORD), WORD)


class _Values:
    """What codes of a tabled kind stand for; made inside a kernel."""

    def __init__(self, packed: Layout) -> None:
        # Scales of E2M1 are stored for twice the values.
        twice = 2 if packed.kind in E2M1 else 1
        values = decode_table(packed.kind) * np.float32(twice)
        self.table, self.held = Registers("float32", 1, len(values)), Registers("int32", WORD, 1)
        self.found = Registers("float32", WORD, 1)
        for code, value in enumerate(values):
            self.table[code] = T.float32(float(value))

    def of(self, codes: Expr) -> Expr:
        """float32 x 4 of int32 x 4 codes."""
        self.held[0] = codes
        for number in range(WORD):
            store(self.found.buffer, number, self.table.buffer[self.held.buffer[number]], 1)
        return self.found[0]


def _stored_codes(packed: Layout, words: list[Expr]) -> list[Expr]:
    """Stored words of a chunk, uint8 x 4 each -> its codes as stored, four columns an int32 x 4."""
    if packed.kind == "int8":
        stored = words[0] if packed.int8_offset else T.reinterpret("int8x4", words[0])
        return [T.cast(stored, f"int32x{WORD}")]
    wide = [T.cast(word, f"int32x{WORD}") for word in words]
    nibbles = wide[1:] if packed.kind == "int6" else wide
    parts = [part for word in nibbles for part in (T.bitwise_and(word, _four(15)), T.shift_right(word, _four(4)))]
    if packed.kind != "int6":
        return parts
    upper = [T.bitwise_and(T.shift_right(wide[0], _four(2 * number)), _four(3)) for number in range(len(parts))]
    return [T.bitwise_or(part, T.shift_left(two, _four(4))) for part, two in zip(parts, upper, strict=True)]


def _four(value: int) -> Expr:
    return int_vector(value, WORD)


def embedding_float(isa: Isa, name: str, kind: str, rows: int, width: int) -> tirx.PrimFunc:
    """ids int32 [T], weights (packed [rows, K] of fp32, bf16 as uint16, fp16, fp8) -> hidden float32 [T, K]."""
    packed = layout(float_precision(kind), rows, width, isa)

    def one_row(row: Expr, weights: Expr, hidden: Expr, target: Expr) -> None:
        lane = T.bind(row % isa.lanes)
        start = T.bind(row // packed.step * packed.block_values + row % packed.step - lane)
        factor = row_factor(packed, weights, row)
        values = Registers("float32", isa.lanes, 1)
        with T.serial(0, width) as column:
            values[0] = load_floats(Vectors(isa), kind, weights, start + column * packed.step)
            store(hidden, target + column, values.buffer[lane] * factor, 1)

    return lookup(name, packed, one_row)


def lookup(name: str, packed: Layout, one_row: Callable[[Expr, Expr, Expr, Expr], None]) -> tirx.PrimFunc:
    """A kernel that calls one_row(row, weights, hidden, first element of hidden to write) for every id."""
    tokens = size("t")
    with kernel(name) as finished:
        ids, weights, hidden = arguments(
            ids=((tokens,), "int32"),
            weights=(packed.shape, packed.dtype),
            hidden=((tokens, packed.width), "float32"),
        )
        few_or_many(
            tokens,
            lambda token: one_row(T.bind(T.cast(ids[token], "int64")), weights, hidden, token * packed.width),
        )
    return finished()


def load_floats(vectors: Vectors, kind: str, weights: Expr, first: Expr) -> Expr:
    """A float32 vector of consecutive stored values of a float kind; those of fp8 come as 2^-8 of theirs."""
    if kind == "fp8":
        return vectors.e4m3_from_bytes(weights, first)
    if kind == "bf16":
        return vectors.load_bfloat(weights, first)
    return vectors.load_half(weights, first) if kind == "fp16" else load(weights, first, vectors.lanes)
