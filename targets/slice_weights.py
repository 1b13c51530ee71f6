"""The weights of a canonical slice, recognised: which graph inputs, and which nodes behind them, are one matrix."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight, Slice, Weight
from exporter.core.errors import UnsupportedError
from exporter.core.rounded_input import RoundedInput, match_rounded_input
from exporter.core.table_weight import TABLES, TableWeight, match_table_weight

FLOAT = int(ir.DataType.FLOAT)
Refuse = Callable[[str], UnsupportedError]


@dataclass(frozen=True)
class Matrix:
    """A weight that no operator has used yet: where it comes from and whether a Transpose stood behind it.

    `part` is set for the codes, scales and zero points of a coded weight until they are joined; `cast` says that a
    half-precision weight still awaits its Cast to float; `rows` (first, behind last) chooses some.
    """

    name: str
    weight: Weight
    part: str = ""
    cast: bool = False
    transposed: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Rounded:
    """A rounded input of a matrix, whose nodes are written only for a product that does not round by itself."""

    group: RoundedInput


@dataclass
class SliceWeights:
    """What a slice's weight inputs are, and the values that a group of nodes makes: a weight looked up in a table, or
    a rounded input. `taken` are the nodes of those groups. Names start with `prefix`; `refuse` makes the error for a
    graph that is not what it should be."""

    slice: Slice
    prefix: str
    refuse: Refuse
    values: dict[ir.Value, Matrix | Rounded] = field(default_factory=dict)
    taken: set[ir.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        for value in self.slice.structure.graph.inputs:
            if (matrix := self._weight_input(str(value.name))) is not None:
                self.values[value] = matrix
        for node in self.slice.structure.graph:
            self._find_group(node)

    def _find_group(self, node: ir.Node) -> None:
        """Take together the nodes that end in this one and round an input or restore a weight from a table."""
        value = node.outputs[0]
        if (rounding := match_rounded_input(value)) is not None:
            self.taken.update(rounding.nodes)
            self.values[value] = Rounded(rounding)
        elif (table := match_table_weight(value)) is not None:
            self.taken.update(table.nodes)
            self.values[value] = self._table_weight(table)

    def _table_weight(self, found: TableWeight) -> Matrix:
        codes, scales = (self.values.get(value) for value in (found.codes, found.scales))
        if not isinstance(codes, Matrix) or not isinstance(scales, Matrix) or codes.name != scales.name:
            raise self.refuse(f"codes {found.codes.name} are multiplied by scales {found.scales.name}")
        precision = getattr(codes.weight, "precision", None)
        stored = precision and (TABLES.get(precision.kind), precision.group_size)
        if (codes.part, scales.part) != ("codes", "scales") or stored != (found.table, found.group):
            looked_up = f"{found.table} in groups of {found.group}"
            raise self.refuse(f"{codes.name} is looked up in {looked_up}, stored as {precision}")
        return Matrix(codes.name, codes.weight)

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


def matrix_of(values: Mapping[ir.Value, object], value: ir.Value | None) -> Matrix | None:
    """The matrix that a value stands for; None for anything else."""
    lowered = None if value is None else values.get(value)
    return lowered if isinstance(lowered, Matrix) else None


def dequantized(
    values: Mapping[ir.Value, object], node: ir.Node, width_of: Callable[[Matrix], int], refuse: Refuse
) -> Matrix:
    """codes, scales (and zero points) of one weight become that weight again; a row of fp8 is one block."""
    parts = [matrix_of(values, value) for value in node.inputs]
    names = ["codes", "scales", "zero_points"][: len(parts)]
    if any(part is None or part.part != name for part, name in zip(parts, names, strict=True)):
        raise refuse(f"DequantizeLinear of {[v.name if v else None for v in node.inputs]}")
    first = parts[0]
    assert first is not None
    precision = getattr(first.weight, "precision", None)
    found = (node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0), len(parts) == 2)
    if precision is None or found != (1, precision.group_of(width_of(first)), precision.symmetric):
        raise refuse(f"{first.name} is dequantized with axis, block size, symmetry {found}, stored as {precision}")
    if any(part.name != first.name for part in parts if part):
        raise refuse(f"{first.name} is dequantized with scales of another weight")
    return Matrix(first.name, first.weight)


def widened(values: Mapping[ir.Value, object], node: ir.Node, refuse: Refuse) -> Matrix:
    """A half-precision weight behind the Cast to float that it awaits."""
    matrix = matrix_of(values, node.inputs[0])
    if matrix is None or not matrix.cast or node.attributes.get_int("to", 0) != FLOAT:
        raise refuse("Cast of something else than a half-precision weight to float")
    return Matrix(matrix.name, matrix.weight)


def transposed(matrix: Matrix, node: ir.Node, refuse: Refuse) -> Matrix:
    """A matrix behind its Transpose."""
    perm = tuple(node.attributes.get_ints("perm", ()))
    if perm != (1, 0) or matrix.transposed or matrix.part or matrix.cast:
        raise refuse(f"Transpose {perm} of weight {matrix.name}")
    return replace(matrix, transposed=True)


def bias_add(values: Mapping[ir.Value, object], node: ir.Node) -> tuple[ir.Node, Matrix] | None:
    """The Add behind a product that adds a bias to it alone, with that bias."""
    product = node.outputs[0]
    users = list(product.consumers())
    if len(users) != 1 or users[0].op_type != "Add" or product.is_graph_output():
        return None
    biases = [matrix_of(values, other) for other in users[0].inputs if other is not product]
    return (users[0], biases[0]) if biases and biases[0] is not None else None


def constant_integers(value: ir.Value | None) -> tuple[int, ...]:
    """The integers of a small constant; empty for anything else."""
    if value is None or value.const_value is None:
        return ()
    return tuple(int(v) for v in value.const_value.numpy().reshape(-1))
