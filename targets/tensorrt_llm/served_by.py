"""What the GPUs that will serve a checkpoint can compute: `--device sm89`, several by commas; any where none is named.

Least compute capabilities: NVIDIA's CUDA C++ programming guide (bfloat16 from 8.0, FP8 from 8.9, FP4 from 10.0). Of
AWQ from ModelOpt and of TensorRT-LLM's own checkpoints: the table of hardware of TensorRT-LLM, whose kernels alone
take them (docs/source/features/quantization.md).
"""

from collections.abc import Iterator
from dataclasses import replace

from exporter.core.device import DeviceOptions
from exporter.core.errors import InputError, UnsupportedError
from exporter.core.gpu import sm
from exporter.core.recipe import Precision, Recipe
from exporter.core.support import Support
from targets.gpu_names import DEVICES, Device, split
from targets.tensorrt_llm.formats import COMPRESSED, LEGACY

Capability = tuple[int, int]
LEAST: dict[str, Capability] = {"bf16": (8, 0), "fp8": (8, 9), "nvfp4": (10, 0)}
TENSORRT_LLM: Capability = (8, 0)
BLACKWELL: Capability = (10, 0)


def device_names() -> dict[str, str]:
    """What `--device` takes, each with one sentence."""
    return {
        name: f"served by {device.summary} (compute capability {device.capability})" for name, device in DEVICES.items()
    }


def named_devices(options: DeviceOptions) -> tuple[Device, ...]:
    """The GPUs that options name; none where they say nothing. Raises InputError for unknown names."""
    if options.device is None:
        return ()
    names = split(options.device)
    for name in names:
        if name not in DEVICES:
            remedy = f"name the GPU that will serve it: {', '.join(DEVICES)}; or leave --device out"
            raise InputError("device.unknown", f"device {name!r} is unknown", remedy)
    if len(set(names)) < len(names):
        raise InputError("device.several", f"--device {options.device} names a GPU twice", "name each once")
    return tuple(DEVICES[name] for name in names)


def refuse_cpu_options(target: str, options: DeviceOptions) -> None:
    """Raise UnsupportedError for options that only CPUs have."""
    if given := [flag for flag in options.given if flag != "--device"]:
        flags = ", ".join(given)
        remedy = f"leave {flags} out; --device sm89 names the GPU that will serve the checkpoint"
        raise UnsupportedError("target.device", f"target {target} takes no {flags}: they are for CPUs", remedy)


def labels(devices: tuple[Device, ...]) -> list[str]:
    """`SM89`: what the recipe was held to, for the manifest."""
    return [sm(device.capability) for device in devices]


def served_support(recipe: Recipe, form: str, devices: tuple[Device, ...]) -> Support:
    """Whether every one of these GPUs computes with a recipe: refused with each reason, or native."""
    faults = [fault for device in devices for fault in _faults(recipe, form, device)]
    if not faults:
        return Support("native")
    whys = list(dict.fromkeys(why for why, _ in faults))
    return Support("refused", "; ".join(whys), faults[0][1])


def _faults(recipe: Recipe, form: str, device: Device) -> Iterator[tuple[str, str]]:
    here = device.numbers
    for kind in sorted(_kinds(recipe), key=lambda kind: LEAST.get(kind, (0, 0)), reverse=True):
        if here < (least := LEAST.get(kind, (0, 0))):
            why = f"{sm(device.capability)} cannot compute with {kind}, {_name(least)} and later do"
            yield why, _remedy(recipe, kind, form, here)
    if form == LEGACY and here < TENSORRT_LLM:
        why = f"TensorRT-LLM runs on {_name(TENSORRT_LLM)} and later, not on {sm(device.capability)}"
        yield why, "leave --format out: vLLM serves --recipe fp16 there"
    if form != COMPRESSED and any(map(_is_awq, _matrices(recipe))):
        yield from _awq_faults(device)


def _awq_faults(device: Device) -> Iterator[tuple[str, str]]:
    """Codes of int4 in ModelOpt's form are loaded by TensorRT-LLM alone."""
    if not TENSORRT_LLM <= device.numbers < BLACKWELL:
        why = f"the kernels of int4 in this form run from {_name(TENSORRT_LLM)} to SM90, not on {sm(device.capability)}"
        yield why, "use --format compressed-tensors and int4-awq, whose kernels vLLM has for it"


def _matrices(recipe: Recipe) -> tuple[Precision, ...]:
    return (recipe.linear, *(override.precision for override in recipe.overrides))


def _is_awq(precision: Precision) -> bool:
    return precision.kind == "int4" and (precision.group_size or 0) > 0


def _kinds(recipe: Recipe) -> set[str]:
    """Kinds of numbers that are multiplied: weights, rounded inputs and cache."""
    rounded = {precision.activations.partition("/")[0] for precision in recipe.precisions if precision.activations}
    return {precision.kind for precision in recipe.precisions} | rounded | {recipe.kv_cache}


def _name(least: Capability) -> str:
    return "SM{}{}".format(*least)


def _remedy(recipe: Recipe, kind: str, form: str, here: Capability) -> str:
    """A recipe that the GPU can do."""
    if here < LEAST["bf16"]:
        return "use --recipe fp16"
    if kind == "fp8" and recipe.kv_cache == "fp8" and "fp8" not in _kinds(_without_cache(recipe)):
        return "leave --kv-cache out"
    if here >= LEAST["fp8"]:
        return "use --recipe fp8"
    other = "int8-smoothquant" if form != "hf" else "bf16, or int8-smoothquant with --format compressed-tensors"
    return f"use --recipe int4-awq, {other}"


def _without_cache(recipe: Recipe) -> Recipe:
    return replace(recipe, kv_cache="fp16")
