"""config.json of a compressed-tensors checkpoint, in the words of compressed-tensors 0.19 (`QuantizationConfig`)."""

from collections.abc import Iterable
from typing import Any

from exporter.core.recipe import CHANNEL, TENSOR, Precision
from targets.tensorrt_llm.formats import compressed_format

VERSION = "0.19.0"
"""Of compressed-tensors, whose words these are."""


def quantization_config(precision: Precision, kv_cache: str, ignored: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json; `ignored` modules stay floats."""
    form = compressed_format(precision)
    group = {
        "targets": ["Linear"],
        "weights": _weights(precision),
        "input_activations": _inputs(precision),
        "output_activations": None,
        "format": form,
    }
    return {
        "config_groups": {"group_0": group},
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": _arguments("float", 8, "tensor") if kv_cache == "fp8" else None,
        "format": form,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": list(ignored),
        "version": VERSION,
    }


def _weights(precision: Precision) -> dict[str, Any]:
    if precision.kind == "nvfp4":
        return _arguments("float", 4, "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
    kind = "int" if precision.is_integer else "float"
    if precision.group_size in (CHANNEL, TENSOR):
        return _arguments(kind, precision.bits, "channel" if precision.group_size == CHANNEL else "tensor")
    return _arguments(kind, precision.bits, "group", group_size=precision.group_size)


def _inputs(precision: Precision) -> dict[str, Any] | None:
    if not precision.activations:
        return None
    kind, _, way = precision.activations.partition("/")
    if kind == "nvfp4":
        scale = {"dynamic": "local", "observer": "static_minmax", "scale_dtype": "torch.float8_e4m3fn"}
        return _arguments("float", 4, "tensor_group", group_size=16) | scale
    number = "int" if kind == "int8" else "float"
    if way == "token":
        return _arguments(number, 8, "token") | {"dynamic": True}
    return _arguments(number, 8, "tensor") | {"observer": "static_minmax"}


def _arguments(
    kind: str, bits: int, strategy: str, group_size: int | None = None, scale_dtype: str | None = None
) -> dict[str, Any]:
    """`QuantizationArgs`, every field of it."""
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "group_size": group_size,
        "strategy": strategy,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "scale_dtype": scale_dtype,
        "zp_dtype": None,
        "observer": None,
        "observer_kwargs": {},
    }
