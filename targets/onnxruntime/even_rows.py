"""Products whose rows do not depend on how many there are.

MatMulNBits multiplies two rows at a time, and a last odd one with another kernel. In blocks of more than 32 (4 bits) or
64 (8 bits) the two sum in different orders, and so a token's result would depend on the length of its chunk, which
rounding of activations amplifies. There a row of zeros makes their number even.
"""

from collections.abc import Callable

import onnx_ir as ir

from targets.onnxruntime.engine_graph import EngineGraph

LARGEST_BLOCKS = {4: 32, 8: 64}
"""Bits of a code -> the largest block whose products are the same in both kernels."""


def needs_even_rows(bits: int, block: int) -> bool:
    return block > LARGEST_BLOCKS[bits]


class EvenRows:
    """Makes the rows of inputs [.., K] even: of all leading axes together, those of `shaped`. What is derived from its
    shape is written once, when it is first needed."""

    def __init__(self, graph: EngineGraph, shaped: ir.Value, axes: int) -> None:
        self._graph, self._shaped, self._axes = graph, shaped, axes
        self._derived: tuple[ir.Value, ir.Value, ir.Value] | None = None

    def multiply(self, x: ir.Value, name: str, product: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """product(x) for x [.., K], computed on an even number of rows -> [.., N]."""
        count, pads, shape = self._derive()
        op, constant = self._graph.op, self._graph.constant
        # Rows of no known number, of the width that x has.
        flat = op("Flatten", [x], f"{name}.rows", attributes={"axis": -1})
        found = product(op("Pad", [flat, pads], f"{name}.even_rows"))
        kept = op("Slice", [found, constant([0]), count, constant([0])], f"{name}.kept_rows")
        return op("Reshape", [kept, shape], f"{name}.shaped")

    def _derive(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """How many rows [1], the pads [4] of [rows, K], and the shape [.., -1] of results."""
        if self._derived is None:
            op, constant, prefix = self._graph.op, self._graph.constant, f"step.even.{self._shaped.name}"
            whole = op("Shape", [self._shaped], f"{prefix}.shape", attributes={"start": 0, "end": self._axes})
            count = op("ReduceProd", [whole], f"{prefix}.count")
            odd = op("Mod", [count, constant([2])], f"{prefix}.odd")
            pads = op("Concat", [constant([0, 0]), odd, constant([0])], f"{prefix}.pads", attributes={"axis": 0})
            shape = op("Concat", [whole, constant([-1])], f"{prefix}.results", attributes={"axis": 0})
            self._derived = count, pads, shape
        return self._derived
