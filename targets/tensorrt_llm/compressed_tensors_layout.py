"""How compressed-tensors stores a quantized matrix X [N, K] in each of its formats.

| format | tensors |
|---|---|
| float-quantized | X.weight E4M3 [N, K]; X.weight_scale F32 [1], or [N, 1] by rows; static: X.input_scale F32 [1] |
| int-quantized | X.weight I8 [N, K], X.weight_scale F32 [N, 1]; static: X.input_scale F32 [1] |
| pack-quantized | X.weight_packed I32 [N, K bits / 32], X.weight_scale [N, G], X.weight_shape I64 [2] |
| nvfp4-pack-quantized | X.weight_packed U8 [N, K / 2], X.weight_scale E4M3 [N, K / 16], |
| | X.weight_global_scale F32 [1]; X.input_global_scale F32 [1] where inputs are rounded: 6 * 448 / amax both |

Scales of whole rows and matrices are float32, as vLLM holds them (`create_fp8_scale_parameter` and
`CompressedTensorsW8A8Int8` in its compressed_tensors/schemes); scales of groups are in the model's type, as
`CompressedTensorsWNA16` holds those. Caches in FP8: self_attn.k_scale and self_attn.v_scale F32 [1].
"""

import numpy as np

from exporter.core.weights import QuantizedRows
from targets.tensorrt_llm.formats import FLOAT_TYPES
from targets.tensorrt_llm.hf_tensors import factored
from targets.tensorrt_llm.packing import pack_columns, pack_words
from targets.tensorrt_llm.piece import Arrays, Encoder
from targets.tensorrt_llm.tensor_file import DTYPES, TensorSpec


def vector(value: float | np.float32) -> np.ndarray:
    """float32 [1]."""
    return np.array([value], np.float32)


class PlainEncoder:
    """float-quantized and int-quantized: a code a byte."""

    def __init__(
        self, module: str, shape: tuple[int, int], dtype: str, by_row: bool, input_scale: float | None
    ) -> None:
        self.module, self._by_row, self._input_scale = module, by_row, input_scale
        scale_shape = (shape[0], 1) if by_row else (1,)
        static = (TensorSpec(f"{module}.input_scale", "F32", (1,)),) if input_scale is not None else ()
        self.specs: tuple[TensorSpec, ...] = (
            TensorSpec(f"{module}.weight", dtype, shape),
            TensorSpec(f"{module}.weight_scale", "F32", scale_shape),
            *static,
        )
        self._scale: np.float32 | None = None

    def encode(self, rows: "np.ndarray | QuantizedRows") -> Arrays:
        assert isinstance(rows, QuantizedRows)
        weight = {f"{self.module}.weight": rows.codes}
        if self._by_row:
            return {**weight, f"{self.module}.weight_scale": rows.scales}
        first = np.float32(rows.scales[0, 0])
        if (rows.scales != first).any() or self._scale not in (None, first):
            raise ValueError(f"{self.module} has several scales, fp8/tensor one")
        self._scale = first
        return weight

    def constants(self) -> Arrays:
        found = {} if self._scale is None else {f"{self.module}.weight_scale": vector(self._scale)}
        if self._input_scale is not None:
            found[f"{self.module}.input_scale"] = vector(self._input_scale)
        return found


class PackedEncoder:
    """pack-quantized: 4- or 8-bit integers in words of 32 bits."""

    def __init__(self, module: str, shape: tuple[int, int], bits: int, groups: int, kind: str) -> None:
        self.module, self._shape, self._bits = module, shape, bits
        words = -(-shape[1] * bits // 32)
        self.specs: tuple[TensorSpec, ...] = (
            TensorSpec(f"{module}.weight_packed", "I32", (shape[0], words)),
            TensorSpec(f"{module}.weight_scale", FLOAT_TYPES[kind], (shape[0], groups)),
            TensorSpec(f"{module}.weight_shape", "I64", (2,)),
        )

    def encode(self, rows: "np.ndarray | QuantizedRows") -> Arrays:
        assert isinstance(rows, QuantizedRows)
        return {
            f"{self.module}.weight_packed": pack_words(rows.codes, self._bits),
            f"{self.module}.weight_scale": rows.scales.astype(DTYPES[self.specs[1].dtype]),
        }

    def constants(self) -> Arrays:
        return {f"{self.module}.weight_shape": np.array(self._shape, np.int64)}


class Nvfp4PackedEncoder:
    """nvfp4-pack-quantized."""

    def __init__(self, module: str, shape: tuple[int, int], matrix: np.float32, input_scale: float | None) -> None:
        self.module, self._matrix, self._input_scale = module, matrix, input_scale
        rows, width = shape
        inputs = (TensorSpec(f"{module}.input_global_scale", "F32", (1,)),) if input_scale is not None else ()
        self.specs: tuple[TensorSpec, ...] = (
            TensorSpec(f"{module}.weight_packed", "U8", (rows, width // 2)),
            TensorSpec(f"{module}.weight_scale", "F8_E4M3", (rows, width // 16)),
            TensorSpec(f"{module}.weight_global_scale", "F32", (1,)),
            *inputs,
        )

    def encode(self, rows: "np.ndarray | QuantizedRows") -> Arrays:
        assert isinstance(rows, QuantizedRows)
        return {
            f"{self.module}.weight_packed": pack_columns(rows.codes),
            f"{self.module}.weight_scale": factored(rows.scales, self._matrix, self.module),
        }

    def constants(self) -> Arrays:
        found = {f"{self.module}.weight_global_scale": vector(np.float32(1) / self._matrix)}
        if self._input_scale is not None:
            found[f"{self.module}.input_global_scale"] = vector(1 / self._input_scale)
        return found


CompressedEncoder = PlainEncoder | PackedEncoder | Nvfp4PackedEncoder


class KvScalesEncoder:
    """Adds the scales of a layer's keys and values to a matrix of it."""

    def __init__(self, inner: Encoder, layer: int, scales: tuple[float, float]) -> None:
        names = [f"model.layers.{layer}.self_attn.{part}_scale" for part in "kv"]
        self._inner = inner
        self._scales = {name: vector(value) for name, value in zip(names, scales, strict=True)}
        self.specs = (*inner.specs, *(TensorSpec(name, "F32", (1,)) for name in names))

    def encode(self, rows: "np.ndarray | QuantizedRows") -> Arrays:
        return self._inner.encode(rows)

    def constants(self) -> Arrays:
        return {**self._inner.constants(), **self._scales}
