"""A graph in bfloat16 as one in float32 that rounds to bfloat16 wherever the other would.

Each operator computes in float32 and its result is rounded once: what ONNX Runtime does for float16 operators without
kernels. Operators that only move values need no rounding. Weights stay in bfloat16 and are widened where they are used.
"""

from typing import TYPE_CHECKING, Any

from exporter.core.errors import UnsupportedError

if TYPE_CHECKING:
    import onnx

MOVING = (
    "Concat",
    "Expand",
    "Gather",
    "GatherElements",
    "GatherND",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "TensorScatter",
    "Tile",
    "Transpose",
    "Unsqueeze",
    "Where",
)
MADE_AS_THEY_ARE = ("Cast", "Constant", "ConstantOfShape")
"""ONNX Runtime has these in bfloat16."""


def round_in_bf16(proto: "onnx.ModelProto") -> bool:
    """Rewrite a graph in place; whether there was any bfloat16 in it.

    Inputs and outputs in bfloat16 become float32 ones that hold values of bfloat16.
    """
    from onnx import TensorProto

    types = _types(proto)
    if TensorProto.BFLOAT16 not in types.values():
        return False
    graph = proto.graph
    weights = {each.name for each in graph.initializer if each.data_type == TensorProto.BFLOAT16}
    rewriter = _Rewriter({name for name, kind in types.items() if kind == TensorProto.BFLOAT16}, weights)
    for node in graph.node:
        rewriter.node(node)
    del graph.node[:]
    graph.node.extend(rewriter.nodes)
    del graph.value_info[:]
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    return True


def _types(proto: "onnx.ModelProto") -> dict[str, int]:
    """Element types of all values. Raises UnsupportedError where an operator's result is of unknown type."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(proto).graph
    infos = (*graph.input, *graph.output, *graph.value_info)
    types = {info.name: info.type.tensor_type.elem_type for info in infos}
    types |= {each.name: each.data_type for each in graph.initializer}
    for node in graph.node:
        for name in node.output:
            if name and not types.get(name):
                raise UnsupportedError(
                    "tensorrt.stand_in",
                    f"the graph's value {name} (of {node.op_type}) is of unknown type: it cannot be computed here",
                    "verify the engine on a GPU, or build with --no-parity",
                )
    return types


class _Rewriter:
    def __init__(self, halves: set[str], weights: set[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._halves, self._weights = halves, weights
        self._widened: set[str] = set()

    def node(self, node: "onnx.NodeProto") -> None:
        """A node on float32 values, and what rounds its results."""
        if node.op_type == "Gather" and node.input[0] in self._weights:
            self._as_it_is(node)  # rows are picked before they are widened: the table is large
            return
        for position, name in enumerate(node.input):
            if name in self._weights:
                node.input[position] = self._widen(name)
        if node.op_type in MADE_AS_THEY_ARE:
            self._as_it_is(node)
            return
        _ask_for_float(node)
        rounded = [] if node.op_type in MOVING else [name for name in node.output if name in self._halves]
        node.output[:] = [f"{name}.exact" if name in rounded else name for name in node.output]
        self.nodes.append(node)
        for name in rounded:
            self._cast(f"{name}.exact", f"{name}.bf16", half=True)
            self._cast(f"{name}.bf16", name)

    def _as_it_is(self, node: "onnx.NodeProto") -> None:
        """A node whose result is in bfloat16 still, then widened."""
        name = node.output[0]
        self.nodes.append(node)
        if name in self._halves:
            node.output[0] = f"{name}.bf16"
            self._cast(f"{name}.bf16", name)

    def _widen(self, weight: str) -> str:
        wide = f"{weight}.float"
        if weight not in self._widened:
            self._widened.add(weight)
            self._cast(weight, wide)
        return wide

    def _cast(self, source: str, result: str, half: bool = False) -> None:
        from onnx import TensorProto, helper

        to = TensorProto.BFLOAT16 if half else TensorProto.FLOAT
        self.nodes.append(helper.make_node("Cast", [source], [result], name=f"{result}.cast", to=to))


def _ask_for_float(node: "onnx.NodeProto") -> None:
    """Attributes that name a type: `output_dtype` of DequantizeLinear, `stash_type`, `precision`."""
    from onnx import TensorProto

    kinds: dict[str, Any] = {each.name: each for each in node.attribute}
    for name in ("output_dtype", "precision", "softmax_precision"):
        if name in kinds and kinds[name].i == TensorProto.BFLOAT16:
            kinds[name].i = TensorProto.FLOAT
