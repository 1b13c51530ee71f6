"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * gamma, in float32 and in the order of the eager Llama."""

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from targets.tvm.isa import Isa
from targets.tvm.kernels.ir import Expr, Registers, arguments, broadcast, float_vector, kernel, load, size
from targets.tvm.kernels.partial import load_part, store_part
from targets.tvm.kernels.vector import Vectors

CHAINS = 4
# Fewer rows than this are done by the calling thread: a parallel region costs about as much as one row.
PARALLEL_ROWS = 3


def norm(isa: Isa, name: str, width: int, eps: float, gather: bool = False) -> tirx.PrimFunc:
    """x float32 [T, K], (rows int32 [Q]), gamma [K] -> y float32 [T, K] or, of the rows asked for, [Q, K]."""
    with kernel(name) as finished:
        tokens, wanted = size("t"), size("q")
        shapes: dict[str, tuple[tuple[Expr, ...], str]] = {"x": ((tokens, width), "float32")}
        if gather:
            shapes["rows"] = ((wanted,), "int32")
        count = wanted if gather else tokens
        x, *rows, gamma, y = arguments(**shapes, gamma=((width,), "float32"), y=((count, width), "float32"))
        vectors = Vectors(isa)

        def one_row(row: Expr) -> None:
            source = T.cast(rows[0][row], "int64") if gather else row
            _norm_row(vectors, x, source * width, gamma, y, row * width, width, eps)

        few_or_many(count, one_row)
    return finished()


def few_or_many(count: Expr, row: Callable[[Expr], None]) -> None:
    """Emit row(0) .. row(count - 1): in a serial loop when there are few, else in parallel."""
    with T.If(count < PARALLEL_ROWS):
        with T.Then(), T.serial(0, count) as number:
            row(number)
        with T.Else(), T.parallel(0, count) as number:
            row(number)


def reciprocal_rms(vectors: Vectors, x: Expr, start: Expr, width: int, eps: float) -> Expr:
    """1 / sqrt(mean(x^2) + eps) of `width` values, a scalar."""
    lanes = vectors.lanes
    sums, edge = Registers("float32", lanes, CHAINS), Registers("float32", lanes, 1)
    for chain in range(CHAINS):
        sums[chain] = float_vector(0.0, lanes)

    def add(chain: int, values: Expr) -> None:
        sums[chain] = vectors.fma(values, values, sums[chain])

    whole = width // (CHAINS * lanes)
    with T.serial(0, whole) as block:
        for chain in range(CHAINS):
            add(chain, load(x, start + (block * CHAINS + chain) * lanes, lanes))
    for chain, offset in enumerate(range(whole * CHAINS * lanes, width, lanes)):
        add(chain, load_part(x, start + offset, min(lanes, width - offset), edge, 0))
    sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3])
    mean = sums.reduce(0, lambda a, b: a + b) / T.float32(width)
    return T.bind(T.float32(1) / T.sqrt(mean + T.float32(eps)))


def _norm_row(
    vectors: Vectors, x: Expr, start: Expr, gamma: Expr, y: Expr, target: Expr, width: int, eps: float
) -> None:
    lanes = vectors.lanes
    scale = reciprocal_rms(vectors, x, start, width, eps)
    edge = Registers("float32", lanes, 2)

    def scaled(offset: Expr, count: int) -> None:
        values = load_part(x, start + offset, count, edge, 0) * broadcast(scale, lanes)
        store_part(y, target + offset, values * load_part(gamma, offset, count, edge, 1), count, edge, 0)

    with T.serial(0, width // lanes) as block:
        scaled(block * lanes, lanes)
    if width % lanes:
        scaled(width - width % lanes, width % lanes)
