"""What lowering a slice knows: the engine so far, and what each canonical value has become in it."""

from dataclasses import dataclass, field, replace

import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight, RotaryTable, ScaleValue, Slice
from exporter.core.errors import UnsupportedError
from targets.onnxruntime.engine_graph import EngineGraph
from targets.onnxruntime.even_rows import EvenRows
from targets.onnxruntime.weight_file import WeightFile
from targets.slice_weights import Matrix, Rounded, SliceWeights


@dataclass(frozen=True)
class Sum:
    """An Add that is written only when something needs it, so that a norm that follows can take it in."""

    left: ir.Value
    right: ir.Value
    name: str


Lowered = ir.Value | Matrix | Sum | Rounded


@dataclass
class SliceLowering:
    """One slice on its way into the engine. `prefix` (`layers.3.`) starts the names of its nodes; `rows` knows how many
    rows its matrices multiply; nodes in
    `claimed` are lowered together, as one group; those in `taken` were lowered with the one before them."""

    graph: EngineGraph
    weights: WeightFile
    slice: Slice
    prefix: str
    rows: EvenRows
    values: dict[ir.Value, Lowered] = field(default_factory=dict)
    claimed: frozenset[ir.Node] = frozenset()
    taken: set[ir.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        found = SliceWeights(self.slice, self.prefix, self.refuse)
        self.values.update(found.values)
        self.taken.update(found.taken)

    def bind(self, feeds: dict[str, Lowered]) -> None:
        """Say what the slice's activations are in the engine."""
        for value in self.slice.structure.graph.inputs:
            if value.name in feeds:
                self.values[value] = feeds[value.name]

    def tensor(self, value: ir.Value) -> ir.Value:
        """The engine's value for a canonical one; writes pending sums and roundings, small constants and vectors."""
        if value not in self.values and value.const_value is not None:
            return self._constant(value.const_value)
        lowered = self.values[value]
        if isinstance(lowered, Rounded):
            for node in lowered.group.nodes:
                self.copy(node)
            return self.tensor(value)
        if isinstance(lowered, Sum):
            lowered = self.graph.op("Add", [lowered.left, lowered.right], f"{lowered.name}.add", outputs=[lowered.name])
        elif isinstance(lowered, Matrix):
            lowered = self.weight_tensor(lowered)
        self.values[value] = lowered
        return lowered

    def weight_tensor(self, matrix: Matrix) -> ir.Value:
        """A weight as a float value of the engine, in the checkpoint's layout [N, K]."""
        if matrix.part or matrix.transposed or matrix.cast:
            raise self.refuse(f"{matrix.name} is used as it is stored")
        weight = matrix.weight
        if isinstance(weight, ScaleValue):
            return self.graph.initializer(ir.tensor(weight.values(), name=matrix.name))
        if isinstance(weight, RotaryTable):
            # One more row than positions: a resting row of a full cache points just behind the last one.
            longer = replace(weight, length=weight.length + 1)
            return self.graph.initializer(self.weights.table(f"rotary.{weight.function}_cache", longer))
        stored = self.graph.initializer(self.weights.floats(matrix.name, weight, matrix.rows))
        if weight.precision.kind == "fp32":
            return stored
        return self.graph.op("Cast", [stored], f"{matrix.name}.cast", attributes={"to": int(ir.DataType.FLOAT)})

    def width(self, matrix: Matrix) -> int:
        """Weights in a row of a matrix of the checkpoint."""
        if not isinstance(matrix.weight, CheckpointWeight):
            raise self.refuse(f"{matrix.name} has no rows of weights")
        return self.weights.shape(matrix.weight)[-1]

    def copy(self, node: ir.Node) -> None:
        """Write an operator that means the same in the engine."""
        inputs = [None if value is None else self.tensor(value) for value in node.inputs]
        attributes = {attribute.name: attribute.value for attribute in node.attributes.values()}
        name = f"{self.prefix}{node.op_type.lower()}"
        self.graph.op(node.op_type, inputs, name, outputs=len(node.outputs), attributes=attributes)
        self.values.update(zip(node.outputs, self.graph.last_node.outputs, strict=True))

    def refuse(self, why: str) -> UnsupportedError:
        return UnsupportedError(
            "onnxruntime.lowering",
            f"{self.slice.label} of the canonical model cannot be lowered to ONNX Runtime: {why}",
            "this is a fault of the canonical model, not of the checkpoint: please report it",
        )

    def _constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        numbers = tensor.numpy().reshape(-1)
        if tensor.dtype == ir.DataType.FLOAT:
            return self.graph.float_constant(float(number) for number in numbers)
        return self.graph.constant([int(number) for number in numbers])
