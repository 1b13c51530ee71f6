"""How ModelOpt's unified Hugging Face checkpoint stores a quantized matrix X [N, K] of each algorithm.

| algorithm | tensors |
|---|---|
| FP8 | X.weight E4M3 [N, K], X.weight_scale F32 [], X.input_scale F32 [] |
| FP8_PER_CHANNEL_PER_TOKEN | X.weight E4M3 [N, K], X.weight_scale F32 [N] |
| W4A16_AWQ | X.weight U8 [N / 2, K], X.weight_scale F32 [N, K / g] |
| W4A8_AWQ | the same, X.weight_scale_2 F32 [], X.input_scale F32 [] |
| NVFP4 | X.weight U8 [N, K / 2], X.weight_scale E4M3 [N, K / 16], X.weight_scale_2 F32 [], X.input_scale F32 [] |

and X.pre_quant_scale [K], ones, for o_proj and down_proj of both AWQ algorithms: TensorRT-LLM reads it there in any
case (tensorrt_llm/_torch/modules/linear.py, `load_weights_vanilla` of W4A16_AWQ_LinearMethod and
W4A8_AWQ_LinearMethod); the scales that AWQ found are in the weights already. Caches in FP8:
self_attn.k_proj.k_scale F32 [], self_attn.v_proj.v_scale.
"""

from collections.abc import Mapping
from threading import Lock

import numpy as np

from exporter.core.errors import UnsupportedError
from exporter.core.number_formats import E4M3_MAX
from exporter.core.weights import QuantizedRows
from targets.tensorrt_llm.formats import FLOAT_TYPES
from targets.tensorrt_llm.nvfp4_scales import block_codes
from targets.tensorrt_llm.packing import pack_columns, pack_row_pairs
from targets.tensorrt_llm.piece import Arrays, Encoder, scalar
from targets.tensorrt_llm.tensor_file import DTYPES, TensorSpec

UNFOLDED = ("o_proj", "down_proj")
"""Matrices whose pre_quant_scale no exporter can fold into a norm before them."""


class Fp8Encoder:
    """FP8: one scale of the matrix and one of its input."""

    def __init__(self, module: str, shape: tuple[int, ...], input_scale: float) -> None:
        self.module, self._input_scale = module, input_scale
        self.specs: tuple[TensorSpec, ...] = (
            TensorSpec(f"{module}.weight", "F8_E4M3", shape),
            TensorSpec(f"{module}.weight_scale", "F32", ()),
            TensorSpec(f"{module}.input_scale", "F32", ()),
        )
        self._scale: np.float32 | None = None

    def encode(self, rows: "np.ndarray | QuantizedRows") -> Arrays:
        assert isinstance(rows, QuantizedRows)
        first = np.float32(rows.scales[0, 0])
        if (rows.scales != first).any() or self._scale not in (None, first):
            raise ValueError(f"{self.module} has several scales, fp8/tensor one")
        self._scale = first
        return {f"{self.module}.weight": rows.codes}

    def constants(self) -> Arrays:
        assert self._scale is not None
        return {
            f"{self.module}.weight_scale": scalar(self._scale),
            f"{self.module}.input_scale": scalar(self._input_scale),
        }


class Fp8ChannelEncoder:
    """FP8_PER_CHANNEL_PER_TOKEN: a scale for each row; those of tokens are computed as they come."""

    def __init__(self, module: str, shape: tuple[int, ...]) -> None:
        self.module = module
        self.specs: tuple[TensorSpec, ...] = (
            TensorSpec(f"{module}.weight", "F8_E4M3", shape),
            TensorSpec(f"{module}.weight_scale", "F32", shape[:1]),
        )

    def encode(self, rows: "np.ndarray | QuantizedRows") -> Arrays:
        assert isinstance(rows, QuantizedRows)
        return {f"{self.module}.weight": rows.codes, f"{self.module}.weight_scale": rows.scales[:, 0]}

    def constants(self) -> Arrays:
        return {}


class Int4Encoder:
    """W4A16_AWQ: pairs of rows in bytes, float32 scales of groups."""

    def __init__(self, module: str, shape: tuple[int, ...], group: int, kind: str) -> None:
        self.module = module
        rows, width = shape
        self._pre_quant = f"{module}.pre_quant_scale" if module.endswith(UNFOLDED) else ""
        pre_quant = (TensorSpec(self._pre_quant, FLOAT_TYPES[kind], (width,)),) if self._pre_quant else ()
        self.specs: tuple[TensorSpec, ...] = (
            *pre_quant,
            TensorSpec(f"{module}.weight", "U8", (rows // 2, width)),
            TensorSpec(f"{module}.weight_scale", "F32", (rows, width // group)),
        )

    def encode(self, rows: "np.ndarray | QuantizedRows") -> Arrays:
        assert isinstance(rows, QuantizedRows)
        return {f"{self.module}.weight": pack_row_pairs(rows.codes), f"{self.module}.weight_scale": rows.scales}

    def constants(self) -> Arrays:
        if not self._pre_quant:
            return {}
        spec = self.specs[0]
        return {self._pre_quant: np.ones(spec.shape, DTYPES[spec.dtype])}


class SharedAmax:
    """max|w| of all matrices that one scale serves, growing as their rows are encoded."""

    def __init__(self) -> None:
        self.value = np.float32(0)
        self._lock = Lock()

    def take(self, values: np.ndarray) -> None:
        largest = np.float32(np.abs(values).max(initial=0))
        with self._lock:
            self.value = max(self.value, largest)


class Int4Fp8Encoder(Int4Encoder):
    """W4A8_AWQ: beside that the scale that maps the largest dequantized weight to 448, shared by the matrices with one
    input, for products in FP8: alpha = input_scale * weight_scale_2, and weight_scale / weight_scale_2 in float16."""

    def __init__(
        self, module: str, shape: tuple[int, ...], group: int, kind: str, input_scale: float, amax: SharedAmax
    ) -> None:
        super().__init__(module, shape, group, kind)
        self._input_scale, self._amax = input_scale, amax
        scales = (
            TensorSpec(f"{module}.weight_scale_2", "F32", ()),
            TensorSpec(f"{module}.input_scale", "F32", ()),
        )
        self.specs = (*self.specs, *scales)

    def encode(self, rows: "np.ndarray | QuantizedRows") -> Arrays:
        assert isinstance(rows, QuantizedRows)
        groups = rows.codes.reshape(*rows.scales.shape, -1)
        largest = np.maximum(groups.max(axis=2), -groups.min(axis=2).astype(np.int16))
        self._amax.take(largest.astype(np.float32) * rows.scales)
        return super().encode(rows)

    def constants(self) -> Arrays:
        largest = self._amax.value or np.float32(E4M3_MAX)
        return {
            **super().constants(),
            f"{self.module}.weight_scale_2": scalar(largest / np.float32(E4M3_MAX)),
            f"{self.module}.input_scale": scalar(self._input_scale),
        }


class Nvfp4Encoder:
    """NVFP4: E2M1 codes in pairs of columns, E4M3 scales of blocks, a float32 shared by the matrices with one input."""

    def __init__(self, module: str, shape: tuple[int, ...], input_scale: float, matrix: np.float32) -> None:
        self.module, self._input_scale, self._matrix = module, input_scale, matrix
        rows, width = shape
        self.specs: tuple[TensorSpec, ...] = (
            TensorSpec(f"{module}.weight", "U8", (rows, width // 2)),
            TensorSpec(f"{module}.weight_scale", "F8_E4M3", (rows, width // 16)),
            TensorSpec(f"{module}.weight_scale_2", "F32", ()),
            TensorSpec(f"{module}.input_scale", "F32", ()),
        )

    def encode(self, rows: "np.ndarray | QuantizedRows") -> Arrays:
        assert isinstance(rows, QuantizedRows)
        return {
            f"{self.module}.weight": pack_columns(rows.codes),
            f"{self.module}.weight_scale": factored(rows.scales, self._matrix, self.module),
        }

    def constants(self) -> Arrays:
        return {
            f"{self.module}.weight_scale_2": scalar(self._matrix),
            f"{self.module}.input_scale": scalar(self._input_scale),
        }


def factored(scales: np.ndarray, matrix: np.float32, module: str) -> np.ndarray:
    """uint8 E4M3 codes whose values times the matrix scale are these scales. UnsupportedError where there are none."""
    codes = block_codes(scales, matrix)
    if codes is None:
        raise UnsupportedError(
            "recipe.nvfp4_scale",
            f"the nvfp4 scales of {module} are not E4M3 multiples of its matrix scale {matrix:.9g}",
            "calibrate again with this version",
        )
    return codes


class KvScaleEncoder:
    """Adds the scale of keys or values to the matrix that computes them."""

    def __init__(self, inner: Encoder, name: str, scale: float) -> None:
        self._inner, self._scale = inner, {name: scalar(scale)}
        self.specs = (*inner.specs, TensorSpec(name, "F32", ()))

    def encode(self, rows: "np.ndarray | QuantizedRows") -> Arrays:
        return self._inner.encode(rows)

    def constants(self) -> Arrays:
        return {**self._inner.constants(), **self._scale}


def kv_scale_names(layer: int) -> tuple[str, str]:
    """Of keys and of values."""
    prefix = f"model.layers.{layer}.self_attn."
    return f"{prefix}k_proj.k_scale", f"{prefix}v_proj.v_scale"


def kv_scale_of(module: str, kv_scales: Mapping[int, tuple[float, float]]) -> tuple[str, float] | None:
    """The scale that goes with a module and its name; None for modules that have none."""
    for layer, (keys, values) in kv_scales.items():
        names = kv_scale_names(layer)
        for name, value in zip(names, (keys, values), strict=True):
            if name.rpartition(".")[0] == module:
                return name, value
    return None
