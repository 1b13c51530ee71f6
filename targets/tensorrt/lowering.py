"""What lowering a slice knows: the graph so far, and what each canonical value has become in it."""

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight, RotaryTable, ScaleValue, Slice
from exporter.core.errors import UnsupportedError
from targets.slice_weights import Matrix, Rounded, SliceWeights
from targets.tensorrt.typed_graph import FLOAT, TypedGraph
from targets.tensorrt.weight_file import TypedWeights


@dataclass(frozen=True)
class Flat:
    """Hidden states [B, S, H] that the canonical head has laid out as [B * S, H]."""

    hidden: ir.Value


@dataclass(frozen=True)
class Step:
    """Values of one step that every layer needs: `mask` bool [B, 1, S, M], None where nothing is cached.

    `positions` is M, or the longest prompt: how many positions the rotary tables have.
    """

    position_ids: ir.Value
    last_rows: ir.Value
    write_indices: ir.Value | None
    mask: ir.Value | None
    positions: int


Lowered = ir.Value | Matrix | Rounded | Flat


@dataclass
class SliceLowering:
    """One slice on its way into the engine's graph. `prefix` (`layers.3.`) starts the names of its nodes; nodes in
    `taken` were lowered with another one. Activations are float32 but where a product or attention wants less."""

    graph: TypedGraph
    weights: TypedWeights
    slice: Slice
    prefix: str
    step: Step
    values: dict[ir.Value, Lowered] = field(default_factory=dict)
    taken: set[ir.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        found = SliceWeights(self.slice, self.prefix, self.refuse)
        self.values.update(found.values)
        self.taken.update(found.taken)

    @property
    def half(self) -> ir.DataType:
        return self.weights.half

    def bind(self, feeds: dict[str, ir.Value]) -> None:
        """Say what the slice's activations are in the engine."""
        for value in self.slice.structure.graph.inputs:
            if value.name in feeds:
                self.values[value] = feeds[value.name]

    def tensor(self, value: ir.Value | None) -> ir.Value:
        """The engine's value for a canonical one: also small constants, and weights that are no matrices."""
        if value is None:
            raise self.refuse("an operator lacks an input")
        if value not in self.values and value.const_value is not None:
            return self._constant(value.const_value)
        lowered = self.values.get(value)
        if isinstance(lowered, Matrix):
            lowered = self.values[value] = self.vector(lowered)
        if not isinstance(lowered, ir.Value):
            raise self.refuse(f"{value.name} is used where TensorRT has no place for it")
        return lowered

    def vector(self, matrix: Matrix) -> ir.Value:
        """A norm's weight, a bias or a rotary table, float32."""
        if matrix.part or matrix.transposed or matrix.cast:
            raise self.refuse(f"{matrix.name} is used as it is stored")
        weight = matrix.weight
        if isinstance(weight, RotaryTable):
            longer = replace(weight, length=self.step.positions)
            return self.graph.initializer(self.weights.table(f"rotary.{weight.function}_cache", longer))
        if isinstance(weight, ScaleValue):
            return self.scalar(f"{matrix.name}", weight.value)
        stored = self.graph.initializer(self.weights.floats(matrix.name, weight))
        return self.graph.cast(stored, FLOAT, matrix.name)

    def scalar(self, name: str, value: float, dtype: ir.DataType = FLOAT) -> ir.Value:
        """A number inside the model file, by its name."""
        return self.graph.initializer(ir.tensor(np.array(value, dtype.numpy()), dtype=dtype, name=name))

    def width(self, matrix: Matrix) -> int:
        """Weights in a row of a matrix of the checkpoint."""
        if not isinstance(matrix.weight, CheckpointWeight):
            raise self.refuse(f"{matrix.name} has no rows of weights")
        return self.weights.shape(matrix.weight)[-1]

    def copy(self, node: ir.Node, name: str) -> None:
        """Write an operator that means the same in the engine, in the type of its first input."""
        inputs = [None if value is None else self.tensor(value) for value in node.inputs]
        attributes = {attribute.name: attribute.value for attribute in node.attributes.values()}
        self.graph.make(node.op_type, inputs, self.prefix + name, outputs=len(node.outputs), attributes=attributes)
        self.values.update(zip(node.outputs, self.graph.last_node.outputs, strict=True))

    def refuse(self, why: str) -> UnsupportedError:
        return UnsupportedError(
            "tensorrt.lowering",
            f"{self.slice.label} of the canonical model cannot be lowered to TensorRT: {why}",
            "this is a fault of the canonical model, not of the checkpoint: please report it",
        )

    def _constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        numbers = tensor.numpy().reshape(-1)
        if tensor.dtype == FLOAT:
            return self.graph.float_constant(float(number) for number in numbers)
        return self.graph.constant([int(number) for number in numbers])
