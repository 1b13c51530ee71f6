"""Engines of tiny checkpoints for target `tvm`, and the devices whose code runs on this machine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from exporter.core.canonical import CanonicalModel
from exporter.core.machine import cpu_features, machine
from exporter.core.progress import NoProgress
from targets.base import BuildSource, DeviceOptions
from targets.registry import get_target
from targets.tvm.devices import DEVICES
from targets.tvm.isa import PROFILES
from targets.tvm.lower.lower import lower
from targets.tvm.lower.program import LoweredModel
from targets.tvm.lower.slice_lowering import Setting
from tests.targets.engines import LIMITS, RECIPES, Engine, build_source

EngineFactory = Callable[..., Engine]
# One device for each x86 profile; those this CPU lacks instructions for are left out.
RUNNABLE = [
    name
    for name in ("x86-64-v4", "x86-64-v3-vnni", "x86-64-v3", "x86-64-v2", "aarch64", "aarch64-dotprod", "aarch64-i8mm")
    if DEVICES[name].machine == machine() and cpu_features().issuperset(DEVICES[name].cpu_features)
]


def tvm_source(checkpoint: Path, recipe: str, kv_cache: str = "fp32", device: str | None = None) -> BuildSource:
    """A build of the hand-written canonical model at one of the shared recipes."""
    source = build_source(checkpoint, RECIPES[recipe], LIMITS)
    chosen = replace(source.recipe, kv_cache=kv_cache)
    return replace(source, recipe=chosen, device=DeviceOptions(device=device))


def build_tvm(source: BuildSource, out: Path, model: CanonicalModel | None = None) -> Engine:
    """Build into a directory that may not exist yet; `model` replaces the canonical model of the source."""
    out.mkdir(parents=True, exist_ok=True)
    source = source if model is None else replace(source, model=model)
    return Engine(out, source, get_target("tvm").build(source, out, NoProgress()))


def lowered(source: BuildSource, profile: str = "x86-64-v3", model: CanonicalModel | None = None) -> LoweredModel:
    """The programs of a build, without compiling them."""
    setting = Setting(source.config, source.checkpoint, PROFILES[profile], source.recipe.kv_cache)
    return lower(model or source.model, setting)
