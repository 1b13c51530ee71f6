"""Reading ModelOpt's quantized Hugging Face checkpoint back: what TensorRT-LLM and vLLM would compute with.

Written from modelopt's `from_quantized_weight` (modelopt/torch/export/quant_utils.py) and from what loads the files:
tensorrt_llm/quantization/modelopt_config.py, tensorrt_llm/_torch/modules/linear.py (`create_weights`, `load_weights_*`)
and vllm/model_executor/layers/quantization/modelopt.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from exporter.core.config import ModelConfig
from exporter.core.recipe import Recipe
from exporter.core.safetensors_file import TensorInfo
from targets.tensorrt_llm.formats import hf_algorithm, matrix_precisions
from targets.tensorrt_llm.stored_checks import (
    Expected,
    ModuleTensors,
    by_group,
    check_finite,
    check_layout,
    check_scales,
    check_shared,
    e2m1,
    fault,
    float_type,
    layer_modules,
    matches,
    open_tensors,
    products,
    read_kv_scales,
    read_object,
    read_scalar,
    stored_config,
    stored_errors,
)
from targets.tensorrt_llm.stored_rows import float_rows

QUANT_CONFIG = "hf_quant_config.json"
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W4A16_AWQ", "W4A8_AWQ", "NVFP4")
WITH_INPUT_SCALE = ("FP8", "W4A8_AWQ", "NVFP4")
WITH_SECOND_SCALE = ("W4A8_AWQ", "NVFP4")
AWQ = ("W4A16_AWQ", "W4A8_AWQ")
LEAST_HALF, MOST_HALF = 2.0**-24, 65504.0


@dataclass(frozen=True)
class Quantization:
    """What hf_quant_config.json says; `algorithm` is empty where nothing is quantized."""

    algorithm: str = ""
    kv_cache: str = ""
    group_size: int = 0
    excluded: tuple[str, ...] = ()

    def covers(self, module: str) -> bool:
        return bool(self.algorithm) and not matches(module, self.excluded)


def open_hf(directory: Path, config: ModelConfig, recipe: Recipe) -> "StoredHf":
    """A checkpoint whose manifest says `config` and `recipe`. ArtifactError (`stored.*`) for what cannot be read."""
    found, inline = stored_config(directory, config)
    return StoredHf(directory, found, recipe, _quantization(directory, inline), open_tensors(directory))


@dataclass(frozen=True)
class StoredHf:
    """The `StoredModel` of targets.base."""

    directory: Path
    config: ModelConfig
    recipe: Recipe
    quantization: Quantization
    tensors: Mapping[str, TensorInfo]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor, float32; of a quantized matrix what its product is computed with, before the
        input is rounded."""
        module = name.removesuffix(".weight")
        if module in self._modules and self.quantization.covers(module):
            parts = ModuleTensors(module, self.tensors)
            found = _DECODERS[self.quantization.algorithm](parts, start, stop)
            if parts.has("pre_quant_scale"):
                found = found * parts.rows("pre_quant_scale", 0, found.shape[1]).astype(np.float32)
            return found
        return float_rows(self.tensors, name, start, stop)

    @cached_property
    def input_scales(self) -> Mapping[str, float]:
        modules = [module for module in self._modules if self.quantization.covers(module)]
        names = {module: f"{module}.input_scale" for module in modules}
        return {m: float(read_scalar(self.tensors[n])) for m, n in names.items() if n in self.tensors}

    @cached_property
    def kv_scales(self) -> Mapping[int, tuple[float, float]]:
        layers = self.config.num_layers if self.quantization.kv_cache else 0
        return read_kv_scales(self.tensors, layers, _kv_names)

    @property
    def requantized(self) -> frozenset[str]:
        """None: every matrix has the codes of `targets.tensorrt_llm.served_rows`."""
        return frozenset()

    @cached_property
    def _modules(self) -> dict[str, tuple[int, int]]:
        return layer_modules(self.config)

    def validate(self) -> None:
        """ArtifactError (`stored.*`), naming file and tensor, for what the format or the recipe forbids."""
        self._check_recipe()
        check_layout(self.tensors, dict(self._expected()))
        for name, info in self.tensors.items():
            self._check_values(name, info)
        for modules in products(self.config):
            for part in ("input_scale", "weight_scale_2"):
                if self.quantization.algorithm in WITH_SECOND_SCALE:
                    check_shared(self.tensors, modules, part)
        if self.quantization.algorithm == "W4A8_AWQ":
            self._check_quotients()

    def _check_recipe(self) -> None:
        """The files quantize what the recipe says, and as it says."""
        for module, precision in matrix_precisions(self.config, self.recipe).items():
            asked = hf_algorithm(precision) if precision.is_coded else ""
            found = self.quantization.algorithm if self.quantization.covers(module) else ""
            if asked != found:
                what = f"{module} is {found or 'not quantized'} in {QUANT_CONFIG}, {precision.describe()} in the recipe"
                raise fault("recipe", what)
            if found in AWQ and precision.group_size != self.quantization.group_size:
                what = (
                    f"groups of {self.quantization.group_size} in {QUANT_CONFIG}, {precision.group_size} in the recipe"
                )
                raise fault("recipe", what)
        if (self.recipe.kv_cache == "fp8") != bool(self.quantization.kv_cache):
            cache = self.quantization.kv_cache or "not quantized"
            raise fault("recipe", f"the KV cache is {cache} in {QUANT_CONFIG}, {self.recipe.kv_cache} in the recipe")

    def _expected(self) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        kind = float_type(self.config)
        for name, shape in self.config.tensor_shapes.items():
            module = name.removesuffix(".weight")
            if module in self._modules and self.quantization.covers(module):
                yield from self._expected_matrix(module, self._modules[module], kind).items()
            else:
                yield name, (kind, shape)
        if self.quantization.kv_cache:
            for layer in range(self.config.num_layers):
                yield from ((name, ("F32", ())) for name in _kv_names(layer))

    def _expected_matrix(self, module: str, shape: tuple[int, int], kind: str) -> Expected:
        algorithm, group = self.quantization.algorithm, self.quantization.group_size
        rows, width = shape
        if algorithm in (*AWQ, "NVFP4") and (not group or width % group):
            raise fault("group_size", f"{QUANT_CONFIG}: groups of {group} do not divide rows of {width} of {module}")
        found: dict[str, tuple[str, tuple[int, ...]]] = {"weight": ("F8_E4M3", shape), "weight_scale": ("F32", ())}
        if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            found["weight_scale"] = ("F32", (rows,))
        elif algorithm == "NVFP4":
            found = {"weight": ("U8", (rows, width // 2)), "weight_scale": ("F8_E4M3", (rows, width // 16))}
        elif algorithm in AWQ:
            found = {"weight": ("U8", (rows // 2, width)), "weight_scale": ("F32", (rows, width // group))}
        if algorithm in WITH_SECOND_SCALE:
            found["weight_scale_2"] = ("F32", ())
        if algorithm in WITH_INPUT_SCALE:
            found["input_scale"] = ("F32", ())
        if algorithm in AWQ and module.endswith(("o_proj", "down_proj")):
            found["pre_quant_scale"] = (kind, (width,))
        return {f"{module}.{part}": value for part, value in found.items()}

    def _check_values(self, name: str, info: TensorInfo) -> None:
        if name.endswith(("scale", "scale_2")):
            # TensorRT-LLM holds the scales of groups in the model's type, or in float16.
            halves = self.quantization.algorithm == "W4A16_AWQ" and float_type(self.config) == "F16"
            limits = (LEAST_HALF, MOST_HALF) if halves and name.endswith("weight_scale") else ()
            check_finite(info)
            check_scales(info, *limits)
        elif info.dtype.name != "uint8":
            check_finite(info)

    def _check_quotients(self) -> None:
        """weight_scale / weight_scale_2 is a float16 in the kernels (`W4A8_AWQ_LinearMethod.load_weights_vanilla`)."""
        for module, (rows, _) in self._modules.items():
            if not self.quantization.covers(module):
                continue
            parts = ModuleTensors(module, self.tensors)
            quotients = parts.rows("weight_scale", 0, rows) / parts.scalar("weight_scale_2")
            if not ((quotients >= LEAST_HALF) & (quotients <= MOST_HALF)).all():
                raise fault("scale", f"{module}: weight_scale / weight_scale_2 leaves the range of float16")


def _kv_names(layer: int) -> tuple[str, str]:
    return f"model.layers.{layer}.self_attn.k_proj.k_scale", f"model.layers.{layer}.self_attn.v_proj.v_scale"


def _fp8(parts: ModuleTensors, start: int, stop: int) -> np.ndarray:
    found: np.ndarray = parts.rows("weight", start, stop).astype(np.float32) * parts.scalar("weight_scale")
    return found


def _fp8_channel(parts: ModuleTensors, start: int, stop: int) -> np.ndarray:
    scales = parts.rows("weight_scale", start, stop)
    found: np.ndarray = parts.rows("weight", start, stop).astype(np.float32) * scales[:, None]
    return found


def _int4(parts: ModuleTensors, start: int, stop: int) -> np.ndarray:
    """A byte holds two rows of one column: the even one in its low half, both in two's complement."""
    first, last = start // 2, -(-stop // 2)
    data = parts.rows("weight", first, last)
    values = np.empty((2 * len(data), data.shape[1]), np.int8)
    values[0::2], values[1::2] = data & 15, data >> 4
    values = np.where(values > 7, values - 16, values)[start - 2 * first : stop - 2 * first]
    return by_group(values, parts.rows("weight_scale", start, stop))


def _nvfp4(parts: ModuleTensors, start: int, stop: int) -> np.ndarray:
    scales = parts.rows("weight_scale", start, stop).astype(np.float32) * parts.scalar("weight_scale_2")
    return by_group(e2m1(parts.rows("weight", start, stop)), scales)


_DECODERS = {
    "FP8": _fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": _fp8_channel,
    "W4A16_AWQ": _int4,
    "W4A8_AWQ": _int4,
    "NVFP4": _nvfp4,
}


def _quantization(directory: Path, inline: dict[str, Any] | None) -> Quantization:
    """hf_quant_config.json, which must say what config.json says."""
    if not (directory / QUANT_CONFIG).exists():
        if inline is not None:
            raise fault("config", f"config.json has a quantization_config, and {QUANT_CONFIG} is missing")
        return Quantization()
    details = read_object(directory, QUANT_CONFIG).get("quantization")
    if not isinstance(details, dict) or inline is None or inline.get("quant_method") != "modelopt":
        raise fault("config", f"{QUANT_CONFIG} and config.json do not both describe a quantization by ModelOpt")
    with stored_errors():
        found = _parse(details)
    scheme = {"": None, "FP8": {"dynamic": False, "num_bits": 8, "type": "float"}}[found.kv_cache]
    said = (inline.get("quant_algo"), inline.get("kv_cache_scheme"), sorted(inline.get("ignore") or []))
    if said != (found.algorithm, scheme, sorted(found.excluded)):
        raise fault("config", f"{QUANT_CONFIG} and the quantization_config of config.json disagree: {said}")
    if inline.get("config_groups") != (groups := _groups(found)):
        raise fault("config", f"config.json: config_groups are not those of {found.algorithm}, {groups}")
    return found


def _groups(found: Quantization) -> dict[str, Any] | None:
    """`config_groups` as `convert_hf_quant_config_format` writes them (modelopt/torch/export/convert_hf_config.py);
    other algorithms are told by their name alone."""
    group: dict[str, Any] = {"dynamic": False, "type": "float"}
    if found.algorithm == "FP8":
        group |= {"num_bits": 8}
    elif found.algorithm == "NVFP4":
        group |= {"num_bits": 4, "group_size": found.group_size}
    else:
        return None
    return {"group_0": {"input_activations": group, "weights": group, "targets": ["Linear"]}}


def _parse(details: dict[str, Any]) -> Quantization:
    algorithm, cache = details.get("quant_algo"), details.get("kv_cache_quant_algo")
    group, excluded = details.get("group_size", 0), details.get("exclude_modules", [])
    if algorithm not in ALGORITHMS:
        raise fault("config", f"{QUANT_CONFIG}: quant_algo {algorithm!r} is not one of {', '.join(ALGORITHMS)}")
    if cache not in (None, "FP8"):
        raise fault("config", f"{QUANT_CONFIG}: kv_cache_quant_algo is {cache!r}")
    if not isinstance(group, int) or isinstance(group, bool) or group < 0:
        raise fault("config", f"{QUANT_CONFIG}: group_size is {group!r}")
    if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
        raise fault("config", f"{QUANT_CONFIG}: exclude_modules is no list of names")
    if details.get("has_zero_point"):
        raise fault("config", f"{QUANT_CONFIG}: zero points are not stored in this form")
    if algorithm in AWQ and details.get("pre_quant_scale") is not True:
        raise fault("config", f"{QUANT_CONFIG}: pre_quant_scale is not true, and the files hold them")
    return Quantization(algorithm, cache or "", group, tuple(excluded))
