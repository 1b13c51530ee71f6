"""Writing kernels: TVM's TIR through its builder, with vectors as values and registers as named groups of them.

A kernel is a Python function that emits TIR while it runs: Python's own loops unroll, `T.serial` and `T.parallel`
stay loops. Vectors are TIR expressions such as `float32x16`; `Registers` are local buffers that LLVM keeps in
vector registers as long as every index is a Python number.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

Expr = Any
"""A TIR expression or a Python number; TVM's own types say no more."""

MAX_STACK_BYTES = 1024
"""A local buffer beyond this leaves the stack, and with it the registers (TVM's kMaxStackAlloca)."""


@contextmanager
def kernel(name: str) -> Iterator[Callable[[], tirx.PrimFunc]]:
    """A kernel under construction; after the block, calling what it yields gives the finished function.

    with kernel("scale") as finished:
        x = argument("x", (n,), "float32")
        ...
    scale = finished()
    """
    builder = IRBuilder()
    with builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        yield builder.get


def size(name: str) -> tirx.Var:
    """A length that the caller's tensors decide."""
    return tirx.Var(name, "int64")


def arguments(**shapes: tuple[tuple[Expr, ...], str]) -> Iterator[Expr]:
    """The kernel's parameters in order, name=(shape, dtype): contiguous tensors that start on a 64-byte boundary.

    Called once, at the top; gives buffers that are addressed flat, whatever their shape: one index counts elements.
    A length made by `size` must stand alone in the shape of the first parameter that has it (`(rows, 64)`, not
    `(rows * 64,)`).
    """
    tensors = [
        T.match_buffer(T.arg(name, T.handle()), shape, dtype, align=64) for name, (shape, dtype) in shapes.items()
    ]
    for tensor, (shape, dtype) in zip(tensors, shapes.values(), strict=True):
        yield tensor if len(shape) == 1 else T.decl_buffer((prod(shape),), dtype, data=tensor.data, align=64)


class Registers:
    """`count` vectors of `lanes` values, read and written by number.

    Raises ValueError when they would not fit on the stack: use two groups then.
    """

    def __init__(self, dtype: str, lanes: int, count: int) -> None:
        if count * lanes * bytes_of(dtype) > MAX_STACK_BYTES:
            raise ValueError(f"{count} vectors of {dtype}x{lanes} leave the stack: split the group")
        self.lanes = lanes
        self.buffer = T.alloc_buffer((count * lanes,), dtype)

    def __getitem__(self, index: int) -> Expr:
        return self.buffer[span(index * self.lanes, self.lanes)]

    def __setitem__(self, index: int, value: Expr) -> None:
        T.buffer_store(self.buffer, value, [span(index * self.lanes, self.lanes)])

    def fill(self, index: int, value: Expr) -> None:
        """Every lane of one vector becomes the scalar `value`."""
        self[index] = T.broadcast(value, self.lanes) if self.lanes > 1 else value

    def reduce(self, index: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
        """One scalar out of all lanes, halving; the vector's lanes are used up."""
        first, half = index * self.lanes, self.lanes // 2
        while half:
            low, high = self.buffer[span(first, half)], self.buffer[span(first + half, half)]
            T.buffer_store(self.buffer, combine(low, high), [span(first, half)])
            half //= 2
        return self.buffer[first]


def bytes_of(dtype: str) -> int:
    """Bytes of one value of a scalar type such as `float16`."""
    return int("".join(filter(str.isdigit, dtype.removeprefix("bfloat").removeprefix("float")))) // 8


def span(first: Expr, lanes: int) -> Expr:
    """The index of `lanes` values from `first` on."""
    return T.ramp(first, 1, lanes) if lanes > 1 else first


def load(buffer: Expr, first: Expr, lanes: int) -> Expr:
    """`lanes` consecutive values of a flat buffer."""
    return buffer[span(first, lanes)]


def store(buffer: Expr, first: Expr, value: Expr, lanes: int) -> None:
    """Write `lanes` consecutive values of a flat buffer."""
    T.buffer_store(buffer, value, [span(first, lanes)])


def broadcast(value: Expr, lanes: int) -> Expr:
    """A vector of equal lanes."""
    return T.broadcast(value, lanes)


def float_vector(value: float, lanes: int) -> Expr:
    """A vector of equal float32 constants."""
    return T.broadcast(T.float32(value), lanes)


def int_vector(value: int, lanes: int) -> Expr:
    """A vector of equal int32 constants."""
    return T.broadcast(T.int32(value), lanes)


def intrinsic(dtype: str, name: str, *arguments: Expr) -> Expr:
    """A pure LLVM intrinsic, such as `llvm.rint`."""
    return T.call_llvm_pure_intrin(dtype, name, *arguments)


def prefetch(buffer: Expr, index: Expr, locality: int = 3) -> None:
    """Ask for a cache line to be read; 3 keeps it in every level, 2 from the second on. Never faults."""
    address = T.address_of(buffer[index])
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, T.int32(0), T.int32(locality), T.int32(1)))
