"""A strongly typed graph under construction: every value's type is known as soon as it is made."""

from collections.abc import Sequence

import onnx_ir as ir

from targets.onnx_graph import OPSETS, Attributes, OnnxGraph

TENSORRT = "trt"
"""The domain of operators that only NVIDIA's ONNX parser knows."""
FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL


class TypedGraph(OnnxGraph):
    """TensorRT 11 chooses no types: what a node computes in is the type of its inputs."""

    def __init__(self, *, vendor_operators: bool = False) -> None:
        super().__init__({**OPSETS, TENSORRT: 1} if vendor_operators else OPSETS)
        self._types: dict[ir.Value, ir.DataType] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def dtype(self, value: ir.Value) -> ir.DataType:
        found = self._types.get(value) or value.dtype
        if found is None:
            raise TypeError(f"the type of {value.name} is not known")
        return found

    def make(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        dtype: ir.DataType | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        attributes: Attributes | None = None,
    ) -> ir.Value:
        """Append a node and return its first output; all have the type `dtype`, or that of the first input."""
        assert inputs[0] is not None
        dtype = dtype or self.dtype(inputs[0])
        self.op(kind, inputs, name, domain=domain, outputs=outputs, attributes=attributes)
        made = self.last_node.outputs
        self._types.update(dict.fromkeys(made, dtype))
        return made[0]

    def set_type(self, value: ir.Value, dtype: ir.DataType) -> None:
        """For a further output that has another type than the first."""
        self._types[value] = dtype

    def cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        """The value in a type; equal casts are shared."""
        if self.dtype(value) == dtype:
            return value
        if (value, dtype) not in self._casts:
            made = self.make("Cast", [value], f"{name}.to_{dtype.name.lower()}", dtype, attributes={"to": int(dtype)})
            self._casts[value, dtype] = made
        return self._casts[value, dtype]
