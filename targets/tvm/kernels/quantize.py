"""Activations to int8 codes, packed as the matrix products read them; activation_scales.py says with which scales.

code = rint(x * (1 / scale)) half to even, sum = the sum of a group's codes; zeros stay zero.
M rows lie in blocks of MR (`rows_per_tile`), the last of what remains: codes [K / 4][rows of the block] int32 words of
4 codes, scales (or shifts) and sums [K / group][rows of the block]. The tensors' nominal shapes are [M, K / 4] and
[M, K / group].
"""

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from targets.base import ActivationRounding
from targets.tvm.activations import has_base
from targets.tvm.isa import Isa
from targets.tvm.kernels.activation_scales import Scales, largest_in_row, scales_of
from targets.tvm.kernels.ir import Expr, Registers, arguments, broadcast, kernel, load, size, store
from targets.tvm.kernels.norm import reciprocal_rms
from targets.tvm.kernels.tile import rows_per_tile
from targets.tvm.kernels.vector import Vectors
from targets.tvm.tuning import DEFAULT, Tuning


def quantize(
    isa: Isa, name: str, width: int, group: int, rounding: ActivationRounding = "group", tuning: Tuning = DEFAULT
) -> tirx.PrimFunc:
    """x float32 [M, K] -> codes int32 [M, K / 4], scales float32 [M, G], sums int32 [M, G].

    With another `rounding` than `group` -> codes, shifts int32 [M, G], sums, bases float32 [M].
    """
    return _quantize(isa, name, width, group, None, False, rounding, tuning)


def norm_quantize(
    isa: Isa,
    name: str,
    width: int,
    group: int,
    eps: float,
    gather: bool = False,
    rounding: ActivationRounding = "group",
    tuning: Tuning = DEFAULT,
) -> tirx.PrimFunc:
    """RMSNorm, then `quantize`: x [T, K], (rows int32 [Q]), gamma [K] -> the outputs of `quantize` of T or Q rows."""
    return _quantize(isa, name, width, group, eps, gather, rounding, tuning)


def _quantize(
    isa: Isa,
    name: str,
    width: int,
    group: int,
    eps: float | None,
    gather: bool,
    rounding: ActivationRounding,
    tuning: Tuning,
) -> tirx.PrimFunc:
    if width % group or group % 16:
        raise ValueError(f"{width} columns in groups of {group}")
    exponents = has_base(rounding)
    with kernel(name) as finished:
        tokens, wanted = size("t"), size("q")
        count = wanted if gather else tokens
        shapes: dict[str, tuple[tuple[Expr, ...], str]] = {
            "x": ((tokens, width), "float32"),
            **({"rows": ((wanted,), "int32")} if gather else {}),
            **({"gamma": ((width,), "float32")} if eps is not None else {}),
            "codes": ((count, width // 4), "int32"),
            "scales": ((count, width // group), "int32" if exponents else "float32"),
            "sums": ((count, width // group), "int32"),
            **({"bases": ((count,), "float32")} if exponents else {}),
        }
        tensors = dict(zip(shapes, arguments(**shapes), strict=True))
        scales = scales_of(rounding, tensors["scales"], tensors.get("bases"))
        emit = _Rows(Vectors(isa), width, group, eps, tensors, scales)
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
    """Emits the quantization of one row; `eps` is None where there is no norm."""

    vectors: Vectors
    width: int
    group: int
    eps: float | None
    tensors: dict[str, Expr]
    scales: Scales

    def row(self, first: Expr, number: Expr, count: Expr) -> None:
        """Row first + number, in a block of `count` rows that begins with row `first`."""
        x, rows = self.tensors["x"], self.tensors.get("rows")
        row = T.bind(first + number)
        start = T.bind((T.cast(rows[row], "int64") if rows is not None else row) * self.width)
        rms = None if self.eps is None else reciprocal_rms(self.vectors, x, start, self.width, self.eps)

        def values(column: Expr) -> Expr:
            return self._load(start, column, rms)

        self.scales.row(row, lambda: largest_in_row(self.vectors, values, self.width))
        groups, words = self.width // self.group, self.group // 4
        with T.serial(0, groups) as group:
            held = Registers("float32", self.vectors.lanes, self.group // self.vectors.lanes)
            for offset in range(0, self.group, self.vectors.lanes):
                held[offset // self.vectors.lanes] = values(group * self.group + offset)
            target = T.bind((first * groups) + group * count + number)
            inverse = self.scales.group(target, lambda: self._largest(held))
            word = T.bind(first * (groups * words) + group * (count * words) + number)
            store(self.tensors["sums"], target, self._codes(held, inverse, word, count), 1)

    def _load(self, start: Expr, column: Expr, rms: Expr) -> Expr:
        """A vector of the row that begins at `start`, normalized."""
        lanes = self.vectors.lanes
        value = load(self.tensors["x"], start + column, lanes)
        if rms is None:
            return value
        return value * broadcast(rms, lanes) * load(self.tensors["gamma"], column, lanes)

    def _largest(self, values: Registers) -> Expr:
        """max|x| of a group, a scalar."""
        vectors = self.group // values.lanes
        chains = min(4, vectors)
        largest = Registers("float32", values.lanes, chains)
        for number in range(vectors):
            size = self.vectors.abs(values[number])
            largest[number % chains] = size if number < chains else T.max(largest[number % chains], size)
        for number in range(1, chains):
            largest[0] = T.max(largest[0], largest[number])
        return largest.reduce(0, T.max)

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
                store(self.tensors["codes"], word + (number * (lanes // 4) + lane) * stride, packed.buffer[lane], 1)
        return total.reduce(0, lambda a, b: a + b)
