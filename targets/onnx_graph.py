"""An engine's ONNX graph under construction: named nodes, and initializers that may lie in an external data file."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

Dimensions = Sequence[int | str]
Attributes = dict[str, int | float | str | Sequence[int]]
OPSETS: Mapping[str, int] = {"": 24}
IR_VERSION = 11


class OnnxGraph:
    """Nodes are appended in the order the data takes; every value and node has a name that people can read.

    `opsets` are the operator domains with their versions.
    """

    def __init__(self, opsets: Mapping[str, int] = OPSETS) -> None:
        self._opsets = dict(opsets)
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._constants: dict[tuple[ir.DataType, tuple[int, ...], bool], ir.Value] = {}
        self._taken: dict[str, int] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Dimensions) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, dtype: ir.DataType, shape: Dimensions) -> None:
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        outputs: Sequence[str] | int = 1,
        attributes: Attributes | None = None,
    ) -> ir.Value:
        """Append a node and return its first output. `outputs` gives their names, or how many are named after it."""
        name = self._unique(name)
        if isinstance(outputs, int):
            outputs = [f"{name}.out"] if outputs == 1 else [f"{name}.out.{index}" for index in range(outputs)]
        values = [ir.Value(name=output) for output in outputs]
        self._nodes.append(ir.node(kind, inputs, attributes or {}, domain=domain, outputs=values, name=name))
        return values[0]

    @property
    def last_node(self) -> ir.Node:
        return self._nodes[-1]

    def constant(self, values: int | Sequence[int], dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A small integer tensor inside the model file; equal ones are shared."""
        scalar = isinstance(values, int)
        data = (values,) if isinstance(values, int) else tuple(values)
        key = (dtype, data, scalar)
        if key not in self._constants:
            name = f"constant.{len(self._constants)}"
            tensor = ir.tensor(values if isinstance(values, int) else list(values), dtype=dtype, name=name)
            self._constants[key] = self.initializer(tensor)
        return self._constants[key]

    def float_constant(self, values: Iterable[float]) -> ir.Value:
        """A small float32 vector inside the model file; equal ones are shared."""
        numbers = np.array(list(values), np.float32)
        name = f"constant.float.{'_'.join(f'{number:.9g}' for number in numbers)}"
        return self.initializer(ir.tensor(numbers, name=name))

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A weight by its name: the same value if it was added before."""
        name = str(tensor.name)
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
        return self._initializers[name]

    def model(self) -> ir.Model:
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=self._opsets,
            name="engine",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="enginesmith")

    def _unique(self, name: str) -> str:
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        return name if count == 0 else f"{name}.{count}"
