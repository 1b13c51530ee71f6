"""Activations to int8 codes, one scale per token and weight group, packed as the matrix products read them.

scale = max|x| / 127, code = rint(x * (1 / scale)) half to even, sum = the sum of a group's codes; zeros stay zero.
M rows lie in blocks of MR (`rows_per_tile`), the last of what remains: codes [K / 4][rows of the block] int32 words of
4 codes, scales and sums [K / group][rows of the block]. The tensors' nominal shapes are [M, K / 4] and [M, K / group].
"""

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from targets.tvm.isa import Isa
from targets.tvm.kernels.ir import Expr, Registers, arguments, broadcast, kernel, load, size, store
from targets.tvm.kernels.norm import reciprocal_rms
from targets.tvm.kernels.tile import rows_per_tile
from targets.tvm.kernels.vector import Vectors
from targets.tvm.tuning import DEFAULT, Tuning


def quantize(isa: Isa, name: str, width: int, group: int, tuning: Tuning = DEFAULT) -> tirx.PrimFunc:
    """x float32 [M, K] -> codes int32 [M, K / 4], scales float32 [M, G], sums int32 [M, G]."""
    return _quantize(isa, name, width, group, None, False, tuning)


def norm_quantize(
    isa: Isa, name: str, width: int, group: int, eps: float, gather: bool = False, tuning: Tuning = DEFAULT
) -> tirx.PrimFunc:
    """RMSNorm, then `quantize`: x [T, K], (rows int32 [Q]), gamma [K] -> codes, scales, sums of T or Q rows."""
    return _quantize(isa, name, width, group, eps, gather, tuning)


def _quantize(
    isa: Isa, name: str, width: int, group: int, eps: float | None, gather: bool, tuning: Tuning
) -> tirx.PrimFunc:
    if width % group or group % 16:
        raise ValueError(f"{width} columns in groups of {group}")
    with kernel(name) as finished:
        tokens, wanted = size("t"), size("q")
        count = wanted if gather else tokens
        shapes: dict[str, tuple[tuple[Expr, ...], str]] = {"x": ((tokens, width), "float32")}
        if gather:
            shapes["rows"] = ((wanted,), "int32")
        if eps is not None:
            shapes["gamma"] = ((width,), "float32")
        x, *read, codes, scales, sums = arguments(
            **shapes,
            codes=((count, width // 4), "int32"),
            scales=((count, width // group), "float32"),
            sums=((count, width // group), "int32"),
        )
        rows, gamma = read[0] if gather else None, read[-1] if eps is not None else None
        emit = _Rows(Vectors(isa), width, group, eps, x, rows, gamma, codes, scales, sums)
        tile = rows_per_tile(isa, tuning)
        with T.If(count == 1):
            with T.Then():
                emit.row(T.int64(0), T.int64(0), 1)
            with T.Else(), T.parallel(0, T.truncdiv(count + (tile - 1), T.int64(tile))) as block:
                first = T.bind(block * tile)
                rows_here = T.bind(T.min(T.int64(tile), count - first))
                with T.serial(0, rows_here) as number:
                    emit.row(first, number, rows_here)
    return finished()


@dataclass(frozen=True)
class _Rows:
    """Emits the quantization of one row; `rows` and `gamma` are None where there is no gather or norm."""

    vectors: Vectors
    width: int
    group: int
    eps: float | None
    x: Expr
    rows: Expr
    gamma: Expr
    codes: Expr
    scales: Expr
    sums: Expr

    def row(self, first: Expr, number: Expr, count: Expr) -> None:
        """Row first + number, in a block of `count` rows that begins with row `first`."""
        source = first + number
        start = T.bind((T.cast(self.rows[source], "int64") if self.rows is not None else source) * self.width)
        rms = None if self.eps is None else reciprocal_rms(self.vectors, self.x, start, self.width, self.eps)
        groups, words = self.width // self.group, self.group // 4
        with T.serial(0, groups) as group:
            values = self._values(start, group * self.group, rms)
            target = T.bind((first * groups) + group * count + number)
            scale, inverse = self._scale(values)
            store(self.scales, target, scale, 1)
            word = T.bind(first * (groups * words) + group * (count * words) + number)
            store(self.sums, target, self._codes(values, inverse, word, count), 1)

    def _values(self, start: Expr, column: Expr, rms: Expr) -> Registers:
        """The values of a group, normalized, in registers."""
        lanes = self.vectors.lanes
        values = Registers("float32", lanes, self.group // lanes)
        for offset in range(0, self.group, lanes):
            value = load(self.x, start + column + offset, lanes)
            if rms is not None:
                value = value * broadcast(rms, lanes) * load(self.gamma, column + offset, lanes)
            values[offset // lanes] = value
        return values

    def _scale(self, values: Registers) -> tuple[Expr, Expr]:
        """max|x| / 127 and its inverse, zero where the scale is."""
        vectors = self.group // values.lanes
        chains = min(4, vectors)
        largest = Registers("float32", values.lanes, chains)
        for number in range(vectors):
            size = self.vectors.abs(values[number])
            largest[number % chains] = size if number < chains else T.max(largest[number % chains], size)
        for number in range(1, chains):
            largest[0] = T.max(largest[0], largest[number])
        scale = T.bind(largest.reduce(0, T.max) / T.float32(127))
        return scale, T.bind(T.Select(scale > T.float32(0), T.float32(1) / scale, T.float32(0)))

    def _codes(self, values: Registers, inverse: Expr, word: Expr, stride: Expr) -> Expr:
        """Stores the codes as words `stride` apart, beginning at `word`; the sum of the codes."""
        lanes = values.lanes
        whole, total = Registers("int32", lanes, 1), Registers("int32", lanes, 1)
        packed = Registers("int32", lanes // 4, 1)
        for number in range(self.group // lanes):
            whole[0] = T.cast(self.vectors.rint(values[number] * broadcast(inverse, lanes)), self.vectors.int)
            total[0] = total[0] + whole[0] if number else whole[0]
            packed[0] = T.reinterpret(f"int32x{lanes // 4}", T.cast(whole[0], f"int8x{lanes}"))
            for lane in range(lanes // 4):
                store(self.codes, word + (number * (lanes // 4) + lane) * stride, packed.buffer[lane], 1)
        return total.reduce(0, lambda a, b: a + b)
