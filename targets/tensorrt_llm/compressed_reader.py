"""Reading compressed-tensors checkpoints back: what vLLM and transformers would compute with.

Written from compressed_tensors (compressors/*/base.py: `decompress`) and from what vLLM creates before it loads
(vllm/model_executor/layers/quantization/compressed_tensors/schemes/*.py: `create_weights`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from exporter.core.config import ModelConfig
from exporter.core.recipe import Recipe
from exporter.core.safetensors_file import TensorInfo
from targets.tensorrt_llm.formats import compressed_format, matrix_precisions
from targets.tensorrt_llm.stored_checks import (
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
    open_tensors,
    products,
    read_kv_scales,
    read_scalar,
    stored_config,
)
from targets.tensorrt_llm.stored_rows import float_rows

FORMATS = ("float-quantized", "int-quantized", "pack-quantized", "nvfp4-pack-quantized")


@dataclass(frozen=True)
class Arguments:
    """What `QuantizationArgs` says of weights, or of inputs."""

    kind: str
    bits: int
    strategy: str
    dynamic: bool | str
    group_size: int | None

    def groups(self, width: int) -> int:
        return width // self.group_size if self.group_size else 1


ROUNDED: dict[str, Arguments | None] = {
    "": None,
    "int8/token": Arguments("int", 8, "token", True, None),
    "int8/tensor": Arguments("int", 8, "tensor", False, None),
    "fp8/token": Arguments("float", 8, "token", True, None),
    "fp8/tensor": Arguments("float", 8, "tensor", False, None),
    "nvfp4/tensor": Arguments("float", 4, "tensor_group", "local", 16),
}
"""What a recipe asks of inputs. `local`: a scale for each block from the input itself, times a stored one."""


@dataclass(frozen=True)
class Compression:
    """What config.json says; `form` is empty where nothing is quantized."""

    form: str = ""
    weights: Arguments | None = None
    inputs: Arguments | None = None
    caches: bool = False
    ignored: frozenset[str] = frozenset()

    def covers(self, module: str) -> bool:
        return bool(self.form) and module not in self.ignored


def open_compressed(directory: Path, config: ModelConfig, recipe: Recipe) -> "StoredCompressed":
    """A checkpoint whose manifest says `config` and `recipe`. ArtifactError (`stored.*`) for what cannot be read."""
    found, quantization = stored_config(directory, config)
    return StoredCompressed(directory, found, recipe, _compression(quantization), open_tensors(directory))


@dataclass(frozen=True)
class StoredCompressed:
    """The `StoredModel` of targets.base."""

    directory: Path
    config: ModelConfig
    recipe: Recipe
    compression: Compression
    tensors: Mapping[str, TensorInfo]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor, float32; of a quantized matrix what its product is computed with."""
        module, weights = name.removesuffix(".weight"), self.compression.weights
        if module in self._modules and self.compression.covers(module) and weights is not None:
            return _DECODERS[self.compression.form](ModuleTensors(module, self.tensors), weights, start, stop)
        return float_rows(self.tensors, name, start, stop)

    @cached_property
    def input_scales(self) -> Mapping[str, float]:
        """Those of nvfp4 stand in the files as what divides."""
        found = {}
        for module in self._modules:
            if (name := f"{module}.input_scale") in self.tensors:
                found[module] = float(read_scalar(self.tensors[name]))
            elif (name := f"{module}.input_global_scale") in self.tensors:
                found[module] = 1 / float(read_scalar(self.tensors[name]))
        return found

    @cached_property
    def kv_scales(self) -> Mapping[int, tuple[float, float]]:
        layers = self.config.num_layers if self.compression.caches else 0
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
            if info.dtype.name not in ("uint8", "int8", "int32", "int64"):
                check_finite(info)
            if name.endswith("_scale"):
                check_scales(info)
        self._check_shapes()
        for modules in products(self.config):
            for part in ("weight_global_scale", "input_global_scale"):
                check_shared(self.tensors, modules, part)

    def _check_recipe(self) -> None:
        for module, precision in matrix_precisions(self.config, self.recipe).items():
            asked = compressed_format(precision) if precision.is_coded else ""
            found = self.compression.form if self.compression.covers(module) else ""
            if asked != found:
                what = f"{module} is {found or 'not quantized'} in config.json, {precision.describe()} in the recipe"
                raise fault("recipe", what)
            weights, inputs = self.compression.weights, self.compression.inputs
            if found and (inputs != ROUNDED[precision.activations] or weights is None):
                raise fault("recipe", f"config.json and the recipe disagree about the inputs of {module}: {inputs}")
            width = self._modules[module][1]
            if found and weights is not None and weights.groups(width) != precision.groups(width):
                what = f"{module} has {weights.groups(width)} scales a row in config.json, {precision.describe()} asked"
                raise fault("recipe", what)
        if (self.recipe.kv_cache == "fp8") != self.compression.caches:
            raise fault("recipe", f"config.json and the recipe ({self.recipe.kv_cache}) disagree about the KV cache")

    def _expected(self) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        kind = float_type(self.config)
        for name, shape in self.config.tensor_shapes.items():
            module = name.removesuffix(".weight")
            if module in self._modules and self.compression.covers(module):
                for part, expected in self._expected_matrix(self._modules[module], kind).items():
                    yield f"{module}.{part}", expected
            else:
                yield name, (kind, shape)
        if self.compression.caches:
            for layer in range(self.config.num_layers):
                yield from ((name, ("F32", (1,))) for name in _kv_names(layer))

    def _expected_matrix(self, shape: tuple[int, int], kind: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        weights, inputs = self.compression.weights, self.compression.inputs
        assert weights is not None
        rows, width = shape
        found: dict[str, tuple[str, tuple[int, ...]]]
        if self.compression.form == "nvfp4-pack-quantized":
            found = {"weight_packed": ("U8", (rows, width // 2)), "weight_scale": ("F8_E4M3", (rows, width // 16))}
            found["weight_global_scale"] = ("F32", (1,))
            return {**found, "input_global_scale": ("F32", (1,))} if inputs else found
        if self.compression.form == "pack-quantized":
            words = -(-width * weights.bits // 32)
            found = {"weight_packed": ("I32", (rows, words)), "weight_scale": (kind, (rows, weights.groups(width)))}
            return {**found, "weight_shape": ("I64", (2,))}
        found = {"weight": ("I8" if weights.kind == "int" else "F8_E4M3", shape)}
        found["weight_scale"] = ("F32", (1,) if weights.strategy == "tensor" else (rows, 1))
        return {**found, "input_scale": ("F32", (1,))} if inputs and not inputs.dynamic else found

    def _check_shapes(self) -> None:
        """weight_shape says what the words of a packed matrix unpack to."""
        for module, shape in self._modules.items():
            parts = ModuleTensors(module, self.tensors)
            if parts.has("weight_shape") and tuple(parts.rows("weight_shape", 0, 2).tolist()) != shape:
                file = self.tensors[f"{module}.weight_shape"].path.name
                raise fault("tensor_shape", f"{file}: {module}.weight_shape is not {list(shape)}")


def _kv_names(layer: int) -> tuple[str, str]:
    return f"model.layers.{layer}.self_attn.k_scale", f"model.layers.{layer}.self_attn.v_scale"


def _plain(parts: ModuleTensors, weights: Arguments, start: int, stop: int) -> np.ndarray:
    codes = parts.rows("weight", start, stop).astype(np.float32)
    scales = parts.scalar("weight_scale") if weights.strategy == "tensor" else parts.rows("weight_scale", start, stop)
    found: np.ndarray = codes * scales
    return found


def _packed(parts: ModuleTensors, weights: Arguments, start: int, stop: int) -> np.ndarray:
    """A word holds its codes from the lowest bits up, each with half its range added."""
    words = parts.rows("weight_packed", start, stop)
    _, width = parts.rows("weight_shape", 0, 2).tolist()
    shifts = np.arange(0, 32, weights.bits, dtype=np.uint32)
    unsigned = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32((1 << weights.bits) - 1)
    codes = unsigned.reshape(len(words), unsigned.shape[1] * len(shifts))[:, :width].astype(np.int32) - (
        1 << (weights.bits - 1)
    )
    return by_group(codes, parts.rows("weight_scale", start, stop))


def _nvfp4(parts: ModuleTensors, weights: Arguments, start: int, stop: int) -> np.ndarray:
    scales = parts.rows("weight_scale", start, stop).astype(np.float32) / parts.scalar("weight_global_scale")
    return by_group(e2m1(parts.rows("weight_packed", start, stop)), scales)


_DECODERS: dict[str, Callable[[ModuleTensors, Arguments, int, int], np.ndarray]] = {
    "float-quantized": _plain,
    "int-quantized": _plain,
    "pack-quantized": _packed,
    "nvfp4-pack-quantized": _nvfp4,
}


def _compression(raw: dict[str, Any] | None) -> Compression:
    if raw is None:
        return Compression()
    groups, form = raw.get("config_groups"), raw.get("format")
    if raw.get("quant_method") != "compressed-tensors" or form not in FORMATS:
        raise fault("config", f"config.json: format {form!r} by {raw.get('quant_method')!r} is not one of ours")
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(group := next(iter(groups.values())), dict):
        raise fault("config", "config.json: config_groups is not one group")
    if group.get("targets") != ["Linear"] or group.get("format", form) != form:
        raise fault("config", "config.json: the group is not of all Linear modules, or of another format")
    ignored = raw.get("ignore")
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise fault("config", "config.json: ignore is no list of names")
    cache = _arguments(raw.get("kv_cache_scheme"), "kv_cache_scheme")
    if cache is not None and cache != Arguments("float", 8, "tensor", False, None):
        raise fault("config", "config.json: kv_cache_scheme is not FP8 with one scale")
    weights = _arguments(group.get("weights"), "weights")
    if weights is None or weights.bits not in (4, 8) or weights.dynamic is not False:
        raise fault("config", "config.json: weights are not of 4 or 8 bits with stored scales")
    inputs = _arguments(group.get("input_activations"), "input_activations")
    return Compression(form, weights, inputs, cache is not None, frozenset(ignored))


def _arguments(raw: object, where: str) -> Arguments | None:
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.get("symmetric", True) is not True:
        raise fault("config", f"config.json: {where} is not symmetric")
    kind, bits, strategy, group = (raw.get(name) for name in ("type", "num_bits", "strategy", "group_size"))
    sound = kind in ("int", "float") and strategy in ("tensor", "channel", "token", "group", "tensor_group")
    if not sound or not isinstance(bits, int) or not (group is None or (isinstance(group, int) and group > 0)):
        raise fault("config", f"config.json: {where} is {kind}, {bits} bits, {strategy}, groups of {group}")
    return Arguments(str(kind), bits, str(strategy), raw.get("dynamic", False), group)
