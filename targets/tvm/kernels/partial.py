"""Vectors at the end of a row, where fewer values remain than a register holds."""

from collections.abc import Iterator

from targets.tvm.kernels.ir import Expr, Registers, float_vector, load, store


def pieces(count: int) -> Iterator[tuple[int, int]]:
    """(offset, length) with lengths that are powers of two, the largest first: 13 = 8 + 4 + 1."""
    offset = 0
    while offset < count:
        part = 1 << ((count - offset).bit_length() - 1)
        yield offset, part
        offset += part


def load_part(source: Expr, start: Expr, count: int, into: Registers, index: int) -> Expr:
    """`count` float32 values and zeros behind them, read through the register into[index]; nothing beyond is read."""
    if count == into.lanes:
        return load(source, start, count)
    into[index] = float_vector(0.0, into.lanes)
    for offset, part in pieces(count):
        store(into.buffer, index * into.lanes + offset, load(source, start + offset, part), part)
    return into[index]


def store_part(target: Expr, start: Expr, value: Expr, count: int, through: Registers, index: int) -> None:
    """The first `count` values of a vector, written through the register through[index]."""
    if count == through.lanes:
        store(target, start, value, count)
        return
    through[index] = value
    for offset, part in pieces(count):
        store(target, start + offset, load(through.buffer, index * through.lanes + offset, part), part)
