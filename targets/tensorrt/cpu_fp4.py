"""E2M1 in standard operators: codes become float32 values, dynamic quantization becomes rounding.

Weights stay packed, two codes a byte, the first in the low half (ONNX, "Float stored in 4 bits"). TensorRT's
TRT_FP4DynamicQuantize (TensorRT operators, IDynamicQuantizeLayer): for each block of 16 the scale max|x| / 6 is divided
by the global one and rounded to E4M3, then x divided by both is rounded to E2M1, to nearest, ties to even.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

DYNAMIC = "TRT_FP4DynamicQuantize"
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
LARGEST, E4M3_LARGEST = 6.0, 448.0
MOVING = ("Transpose", "Reshape", "Identity")


def decode_fp4(proto: "onnx.ModelProto") -> bool:
    """Replace every four-bit float of a graph, in place; whether there were any."""
    from onnx import TensorProto

    graph = proto.graph
    weights = [each for each in graph.initializer if each.data_type == TensorProto.FLOAT4E2M1]
    rewriter = _Rewriter()
    fp4 = {weight.name for weight in weights}
    for weight in weights:
        rewriter.unpack(weight)
    found = bool(weights)
    for node in graph.node:
        if node.op_type == DYNAMIC:
            rewriter.quantize(node)
            fp4.add(node.output[0])
            found = True
        elif node.op_type == "DequantizeLinear" and node.input[0] in fp4:
            rewriter.dequantize(node)
        else:
            rewriter.nodes.append(node)
            if node.op_type in MOVING and node.input[0] in fp4:
                fp4.add(node.output[0])
    if found:
        nodes = list(rewriter.nodes)
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(rewriter.constants.values())
        _drop_types(graph, fp4)
    return found


def _drop_types(graph: "onnx.GraphProto", names: set[str]) -> None:
    """Types that the graph noted of values that changed theirs."""
    kept = [info for info in graph.value_info if info.name not in names]
    del graph.value_info[:]
    graph.value_info.extend(kept)


class _Rewriter:
    """New nodes in order, and the constants they use, each once."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._numbers: Iterator[int] = iter(range(1 << 62))

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        from onnx import helper

        name = output or f"fp4.{next(self._numbers)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, *values: float, dtype: Any = np.float32, scalar: bool = False) -> str:
        from onnx import numpy_helper

        array = np.array(values[0] if scalar else values, dtype)
        name = f"fp4.constant.{array.dtype}.{array.tolist()}"
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(*values, dtype=np.int64)

    def unpack(self, weight: "onnx.TensorProto") -> None:
        """The initializer becomes its bytes, under another name; float32 values take its own."""
        from onnx import TensorProto

        shape, name = list(weight.dims), weight.name
        if weight.int32_data:  # not how any writer stores large ones
            weight.raw_data = np.array(weight.int32_data, np.uint8).tobytes()
            del weight.int32_data[:]
        weight.name, weight.data_type = f"{name}.packed", TensorProto.UINT8
        weight.dims[:] = [(math.prod(shape) + 1) // 2]
        low = self.op("BitwiseAnd", weight.name, self.constant(15, dtype=np.uint8))
        high = self.op("BitShift", weight.name, self.constant(4, dtype=np.uint8), direction="RIGHT")
        pairs = [self.op("Unsqueeze", half, self.ints(1)) for half in (low, high)]
        flat = self.op("Reshape", self.op("Concat", *pairs, axis=1), self.ints(-1))
        codes = self.op("Slice", flat, self.ints(0), self.ints(math.prod(shape)))
        table = self.constant(*VALUES, *-VALUES)
        values = self.op("Gather", table, self.op("Cast", codes, to=TensorProto.INT32))
        self.op("Reshape", values, self.ints(*shape), output=name)

    def dequantize(self, node: "onnx.NodeProto") -> None:
        """Values times their block's scale. The output has the scale's type, as the operator's has."""
        attributes = _attributes(node)
        block, axis = int(attributes.get("block_size", 0)), int(attributes.get("axis", 1))
        values = self.op("CastLike", node.input[0], node.input[1])
        if not block:
            self.op("Mul", values, node.input[1], output=node.output[0])
            return
        blocks = self._blocks(values, axis, block)
        scaled = self.op("Mul", blocks, self.op("Unsqueeze", node.input[1], self.ints(_inner(axis))))
        self.op("Reshape", scaled, self.op("Shape", values), output=node.output[0])

    def quantize(self, node: "onnx.NodeProto") -> None:
        """Outputs: values of E2M1 in float32, like x; and the blocks' scales in E4M3."""
        from onnx import TensorProto

        attributes = _attributes(node)
        axis, block = int(attributes["axis"]), int(attributes["block_size"])
        x = self.op("Cast", node.input[0], to=TensorProto.FLOAT)
        globally = self.op("Cast", node.input[1], to=TensorProto.FLOAT)
        blocks, inner = self._blocks(x, axis, block), self.ints(_inner(axis))
        largest = self.op("ReduceMax", self.op("Abs", blocks), inner, keepdims=0)
        scale = self.op("Div", self.op("Div", largest, self._scalar(LARGEST)), globally)
        bounded = self.op("Min", scale, self._scalar(E4M3_LARGEST))
        coded = self.op("Cast", bounded, output=node.output[1], to=TensorProto.FLOAT8E4M3FN)
        whole = self.op("Mul", self.op("Cast", coded, to=TensorProto.FLOAT), globally)
        steps = self.op("Unsqueeze", whole, inner)
        empty = self.op("Equal", steps, self._scalar(0.0))
        quotient = self.op("Div", blocks, self.op("Where", empty, self._scalar(1.0), steps))
        rounded = self._round(self.op("Where", empty, self._scalar(0.0), quotient))
        self.op("Reshape", rounded, self.op("Shape", x), output=node.output[0])

    def _round(self, x: str) -> str:
        """To the nearest of VALUES, with x's sign. Steps are 0.5 below 2, 1 below 4, 2 above; codes of even multiples
        are even, so that Round's ties go where E2M1's do."""
        size = self.op("Min", self.op("Abs", x), self._scalar(LARGEST))
        wide = self.op("Where", self.op("Less", size, self._scalar(4.0)), self._scalar(1.0), self._scalar(2.0))
        step = self.op("Where", self.op("Less", size, self._scalar(2.0)), self._scalar(0.5), wide)
        return self.op("Mul", self.op("Sign", x), self.op("Mul", self.op("Round", self.op("Div", size, step)), step))

    def _blocks(self, x: str, axis: int, block: int) -> str:
        """[.., K, ..] -> [.., K / block, block, ..], whatever the rank."""
        head = self.op("Shape", x, end=axis) if axis else ""
        tail = self.op("Shape", x, start=axis + 1) if axis != -1 else ""
        parts = [part for part in (head, self.ints(-1, block), tail) if part]
        return self.op("Reshape", x, self.op("Concat", *parts, axis=0))

    def _scalar(self, value: float) -> str:
        return self.constant(value, scalar=True)


def _inner(axis: int) -> int:
    """Where a block's own axis lies once K is split in two."""
    return axis if axis < 0 else axis + 1


def _attributes(node: "onnx.NodeProto") -> dict[str, Any]:
    from onnx import helper

    return {each.name: helper.get_attribute_value(each) for each in node.attribute}
