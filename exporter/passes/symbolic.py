"""Shapes and small integer tensors of a raw slice, as expressions in B (batch), S (new), P (past) positions."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import sympy  # type: ignore[import-untyped]

Dims = tuple[sympy.Expr, ...]

# A batch and a step are never empty, a past may be; so -1 in a shape is never a size.
SYMBOLS = {
    "B": sympy.Symbol("B", integer=True, positive=True),
    "S": sympy.Symbol("S", integer=True, positive=True),
    "P": sympy.Symbol("P", integer=True, nonnegative=True),
}
SYMBOLS["T"] = SYMBOLS["P"] + SYMBOLS["S"]
MAX_ELEMENTS = 16


@dataclass
class Symbolic:
    """What is known before running: `shapes` of values, and `integers`, the content of int64 and bool tensors.

    Content is a numpy array of sympy expressions. A value that is absent is unknown, never wrong.
    """

    shapes: dict[ir.Value, Dims] = field(default_factory=dict)
    integers: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    dtypes: dict[ir.Value, ir.DataType] = field(default_factory=dict)

    def constant(self, value: ir.Value) -> np.ndarray | None:
        """The content as int64 where no symbol is left in it."""
        found = self.integers.get(value)
        if found is None or not all(isinstance(item, sympy.Integer) for item in found.reshape(-1)):
            return None
        return np.array([int(item) for item in found.reshape(-1)], np.int64).reshape(found.shape)


def evaluate(graph: ir.Graph) -> Symbolic:
    """Walk a graph in order, from the interface's shapes (dimensions B, S, P, T or numbers)."""
    known = Symbolic()
    for value in graph.inputs:
        if value.shape is not None and all(isinstance(d, int) or str(d) in SYMBOLS for d in value.shape):
            known.shapes[value] = tuple(_dimension(d) for d in value.shape)
        if value.dtype is not None:
            known.dtypes[value] = value.dtype
    for value in graph.initializers.values():
        _know_constant(known, value)
    for node in graph:
        _evaluate_node(known, node)
    return known


def _dimension(size: int | ir.SymbolicDim) -> sympy.Expr:
    return sympy.Integer(size) if isinstance(size, int) else SYMBOLS[str(size)]


def _know_constant(known: Symbolic, value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None:
        return
    known.shapes[value] = tuple(sympy.Integer(size) for size in tensor.shape)
    known.dtypes[value] = tensor.dtype
    if tensor.dtype in (ir.DataType.INT64, ir.DataType.BOOL) and tensor.size <= MAX_ELEMENTS:
        known.integers[value] = _symbols(tensor.numpy())


def _symbols(array: np.ndarray) -> np.ndarray:
    result = np.empty(array.shape, object)
    result.reshape(-1)[:] = [sympy.sympify(item.item()) for item in array.reshape(-1)]
    return result


def _evaluate_node(known: Symbolic, node: ir.Node) -> None:
    out = node.outputs[0]
    if (dtype := _dtype(known, node)) is not None:
        known.dtypes[out] = dtype
    content = _content(known, node)
    if content is not None:
        known.integers[out] = content
        known.shapes[out] = tuple(sympy.Integer(size) for size in content.shape)
        return
    shape = _shape(known, node)
    if shape is not None:
        known.shapes[out] = tuple(sympy.expand(size) for size in shape)


def _dtype(known: Symbolic, node: ir.Node) -> ir.DataType | None:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in ("Shape", "ConstantOfShape"):
        return ir.DataType.INT64
    if node.op_type == "Equal":
        return ir.DataType.BOOL
    source = node.inputs[1 if node.op_type == "Where" else 0]
    return known.dtypes.get(source) if source is not None else None


def _content(known: Symbolic, node: ir.Node) -> np.ndarray | None:
    """Content of the node's output where all it reads is known."""
    if node.op_type == "Shape":
        return _shape_content(known, node)
    rule = CONTENT_RULES.get(node.op_type)
    arguments = [known.integers.get(value) for value in node.inputs if value is not None]
    if rule is None or not arguments or any(argument is None for argument in arguments):
        return None
    if known.dtypes.get(node.outputs[0]) not in (ir.DataType.INT64, ir.DataType.BOOL):
        return None
    return rule(node, *arguments)


def _shape_content(known: Symbolic, node: ir.Node) -> np.ndarray | None:
    source = node.inputs[0]
    shape = known.shapes.get(source) if source is not None else None
    if shape is None:
        return None
    start = node.attributes.get_int("start", 0)
    stop = node.attributes.get_int("end", len(shape))
    result = np.empty(len(shape[start:stop]), object)
    result[:] = shape[start:stop]
    return result


def _ints(array: np.ndarray) -> list[int]:
    return [int(item) for item in array.reshape(-1)]


def _slice_content(node: ir.Node, data: np.ndarray, *bounds: np.ndarray) -> np.ndarray:
    """Bounds are starts, ends, axes and steps of the only axis; the last two may be missing."""
    start, end = (_ints(bound)[0] for bound in bounds[:2])
    step = _ints(bounds[3])[0] if len(bounds) > 3 else 1
    return data[start:end:step]


def _unsqueeze(node: ir.Node, data: np.ndarray, axes: np.ndarray) -> np.ndarray:
    return np.expand_dims(data, tuple(_ints(axes)))


def _equal(node: ir.Node, a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """Equality where it is the same for all sizes; unknown if it depends on them."""
    answers = [sympy.Eq(x, y) for x, y in np.broadcast(a, b)]
    if not all(answer in (sympy.true, sympy.false) for answer in answers):
        return None
    result = np.empty(np.broadcast(a, b).shape, object)
    result.reshape(-1)[:] = answers
    return result


def _where(node: ir.Node, condition: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    return np.where(condition == sympy.true, yes, no)


def _constant_of_shape(node: ir.Node, shape: np.ndarray) -> np.ndarray:
    fill = node.attributes["value"].as_tensor().numpy().reshape(-1)[0] if "value" in node.attributes else 0
    return np.full(_ints(shape), sympy.sympify(fill.item() if hasattr(fill, "item") else fill), object)


CONTENT_RULES: dict[str, Callable[..., np.ndarray | None]] = {
    "Identity": lambda node, data: data,
    "Cast": lambda node, data: data,
    "Reshape": lambda node, data, shape: data.reshape(_ints(shape)),
    "Squeeze": lambda node, data, *axes: np.squeeze(data, tuple(_ints(axes[0])) if axes else None),
    "Unsqueeze": _unsqueeze,
    "Concat": lambda node, *parts: np.concatenate(parts),
    "Gather": lambda node, data, indices: np.asarray(data[indices.astype(np.int64)], object),
    "Slice": _slice_content,
    "Add": lambda node, a, b: np.asarray(a + b, object),
    "Sub": lambda node, a, b: np.asarray(a - b, object),
    "Mul": lambda node, a, b: np.asarray(a * b, object),
    "Div": lambda node, a, b: np.asarray(a // b, object),
    "Equal": _equal,
    "Where": _where,
    "ConstantOfShape": _constant_of_shape,
}


def _shape(known: Symbolic, node: ir.Node) -> Dims | None:
    """Shape of the node's output where its inputs' shapes are known."""
    rule = SHAPE_RULES.get(node.op_type)
    shapes = [known.shapes.get(value) for value in node.inputs if value is not None]
    if rule is None or not shapes or any(shape is None for shape in shapes):
        return None
    return rule(known, node, *shapes)


def _argument(known: Symbolic, node: ir.Node, index: int) -> list[int] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    found = known.constant(value) if value is not None else None
    return None if found is None else [int(item) for item in found.reshape(-1)]


def broadcast(*shapes: Dims) -> Dims | None:
    """ONNX's multidirectional broadcasting, None where it depends on the sizes."""
    rank = max(len(shape) for shape in shapes)
    padded = [(sympy.Integer(1),) * (rank - len(shape)) + shape for shape in shapes]
    result = []
    for sizes in zip(*padded, strict=True):
        distinct = {size for size in sizes if size != 1}
        if len(distinct) > 1:
            return None
        result.append(distinct.pop() if distinct else sympy.Integer(1))
    return tuple(result)


def _matmul(known: Symbolic, node: ir.Node, a: Dims, b: Dims) -> Dims | None:
    if len(a) < 2 or len(b) < 2 or (batch := broadcast(a[:-2], b[:-2]) if a[:-2] or b[:-2] else ()) is None:
        return None
    return (*batch, a[-2], b[-1])


def _reshape(known: Symbolic, node: ir.Node, data: Dims, _: Dims) -> Dims | None:
    target = known.integers.get(node.inputs[1]) if node.inputs[1] is not None else None
    if target is None:
        return None
    zero_copies = node.attributes.get_int("allowzero", 0) == 0
    sizes = [data[i] if item == 0 and zero_copies else item for i, item in enumerate(target)]
    rest = sympy.prod([size for size in sizes if size != -1])
    return tuple(sympy.cancel(sympy.prod(data) / rest) if size == -1 else size for size in sizes)


def _expand(known: Symbolic, node: ir.Node, data: Dims, _: Dims) -> Dims | None:
    target = known.integers.get(node.inputs[1]) if node.inputs[1] is not None else None
    return None if target is None else broadcast(data, tuple(target))


def _concat(known: Symbolic, node: ir.Node, *parts: Dims) -> Dims | None:
    axis = node.attributes["axis"].as_int() % len(parts[0])
    joined = list(parts[0])
    joined[axis] = sum((part[axis] for part in parts), sympy.Integer(0))
    return tuple(joined)


def _slice(known: Symbolic, node: ir.Node, data: Dims, *_: Dims) -> Dims | None:
    starts, ends, axes, steps = (_argument(known, node, i) for i in range(1, 5))
    if starts is None or ends is None or axes is None or (steps or [1] * len(axes)) != [1] * len(axes):
        return None
    result = list(data)
    for start, end, axis in zip(starts, ends, axes, strict=True):
        if isinstance(data[axis], sympy.Integer):
            result[axis] = sympy.Integer(len(range(int(data[axis]))[start:end]))
        elif start != 0 or end != np.iinfo(np.int64).max:
            return None
    return tuple(result)


def _unsqueezed(known: Symbolic, node: ir.Node, data: Dims, _: Dims) -> Dims | None:
    axes = _argument(known, node, 1)
    if axes is None:
        return None
    rank = len(data) + len(axes)
    places = {axis % rank for axis in axes}
    remaining = iter(data)
    return tuple(sympy.Integer(1) if i in places else next(remaining) for i in range(rank))


def _reduced(known: Symbolic, node: ir.Node, data: Dims, *_: Dims) -> Dims | None:
    axes = _argument(known, node, 1)
    if axes is None or not node.attributes.get_int("keepdims", 1):
        return None
    places = {axis % len(data) for axis in axes}
    return tuple(sympy.Integer(1) if i in places else size for i, size in enumerate(data))


def _gather(known: Symbolic, node: ir.Node, data: Dims, indices: Dims) -> Dims | None:
    return (*indices, *data[1:]) if node.attributes.get_int("axis", 0) == 0 else None


def _transposed(known: Symbolic, node: ir.Node, data: Dims) -> Dims | None:
    return tuple(data[i] for i in node.attributes["perm"].as_ints())


SHAPE_RULES: dict[str, Callable[..., Dims | None]] = {
    **dict.fromkeys(
        ("Cast", "Cos", "Identity", "Neg", "Reciprocal", "Sigmoid", "Sin", "Softmax", "Sqrt"),
        lambda known, node, data, *_: data,
    ),
    **dict.fromkeys(("Add", "Div", "Mul", "Pow", "Sub", "Where"), lambda known, node, *shapes: broadcast(*shapes)),
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Expand": _expand,
    "Concat": _concat,
    "Slice": _slice,
    "Unsqueeze": _unsqueezed,
    "ReduceMean": _reduced,
    "Gather": _gather,
    "Transpose": _transposed,
}
