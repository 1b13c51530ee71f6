"""What lowering a slice knows: the engine so far, and what each canonical value has become in it."""

from dataclasses import dataclass, field, replace

import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight, RotaryTable, Slice
from exporter.core.errors import UnsupportedError
from targets.onnxruntime.engine_graph import EngineGraph
from targets.onnxruntime.weight_file import WeightFile


@dataclass(frozen=True)
class Matrix:
    """A weight that no operator has used yet: where it comes from and whether a Transpose stood behind it.

    `part` is set for the codes, scales and zero points of an integer weight until DequantizeLinear joins them;
    `cast` says that a half-precision weight still awaits its Cast to float; `rows` (first, behind last) chooses some.
    """

    name: str
    weight: CheckpointWeight | RotaryTable
    part: str = ""
    cast: bool = False
    transposed: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Sum:
    """An Add that is written only when something needs it, so that a norm that follows can take it in."""

    left: ir.Value
    right: ir.Value
    name: str


Lowered = ir.Value | Matrix | Sum


@dataclass
class SliceLowering:
    """One slice on its way into the engine. `prefix` (`layers.3.`) starts the names of its nodes; nodes in
    `claimed` are lowered together, as one group; those in `taken` were lowered with the one before them."""

    graph: EngineGraph
    weights: WeightFile
    slice: Slice
    prefix: str
    values: dict[ir.Value, Lowered] = field(default_factory=dict)
    claimed: frozenset[ir.Node] = frozenset()
    taken: set[ir.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        for value in self.slice.structure.graph.inputs:
            if (matrix := self._weight_input(str(value.name))) is not None:
                self.values[value] = matrix

    def bind(self, feeds: dict[str, Lowered]) -> None:
        """Say what the slice's activations are in the engine."""
        for value in self.slice.structure.graph.inputs:
            if value.name in feeds:
                self.values[value] = feeds[value.name]

    def tensor(self, value: ir.Value) -> ir.Value:
        """The engine's value for a canonical one; writes pending sums, small constants and vectors."""
        if value not in self.values and value.const_value is not None:
            return self.graph.constant(constant_integers(value))
        lowered = self.values[value]
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
        if isinstance(weight, RotaryTable):
            # One more row than positions: a resting row of a full cache points just behind the last one.
            longer = replace(weight, length=weight.length + 1)
            return self.graph.initializer(self.weights.table(f"rotary.{weight.function}_cache", longer))
        stored = self.graph.initializer(self.weights.floats(matrix.name, weight, matrix.rows))
        if weight.precision.kind == "fp32":
            return stored
        return self.graph.op("Cast", [stored], f"{matrix.name}.cast", attributes={"to": int(ir.DataType.FLOAT)})

    def refuse(self, why: str) -> UnsupportedError:
        return UnsupportedError(
            "onnxruntime.lowering",
            f"{self.slice.label} of the canonical model cannot be lowered to ONNX Runtime: {why}",
            "this is a fault of the canonical model, not of the checkpoint: please report it",
        )

    def _weight_input(self, name: str) -> Matrix | None:
        weights = self.slice.weights
        base, _, part = name.rpartition(".")
        if name in weights:
            weight = weights[name]
            cast = isinstance(weight, CheckpointWeight) and weight.precision.kind in ("bf16", "fp16")
            return Matrix(self.prefix + name, weight, cast=cast)
        if base in weights and part in ("codes", "scales", "zero_points"):
            return Matrix(self.prefix + base, weights[base], part=part)
        return None


def constant_integers(value: ir.Value | None) -> tuple[int, ...]:
    """The integers of a small constant; empty for anything else."""
    if value is None or value.const_value is None:
        return ()
    return tuple(int(v) for v in value.const_value.numpy().reshape(-1))
