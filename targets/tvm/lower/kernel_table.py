"""The kernel factories by name; only those that a model needs are imported."""

from importlib import import_module

from tvm import tirx

from targets.tvm.isa import Isa
from targets.tvm.tuning import DEFAULT, Tuning

MODULES = {
    "attention": "attention",
    "embedding_float": "embedding",
    "embedding_int": "embedding",
    "linear_float": "linear_float",
    "linear_int": "linear_int",
    "norm": "norm",
    "norm_quantize": "quantize",
    "quantize": "quantize",
    "round_fp8": "round_fp8",
    "rotary_cache": "rotary_cache",
}
"""Factory -> the module of targets.tvm.kernels that has it."""


TUNED = ("attention", "linear_int", "norm_quantize", "quantize")
"""Factories that take a tuning."""


def generate(
    isa: Isa, name: str, factory: str, arguments: tuple[object, ...], tuning: Tuning = DEFAULT
) -> tirx.PrimFunc:
    """The kernel `name` of a factory; KeyError for a factory that does not exist."""
    module = import_module(f"targets.tvm.kernels.{MODULES[factory]}")
    chosen = {"tuning": tuning} if factory in TUNED else {}
    function: tirx.PrimFunc = getattr(module, factory)(isa, name, *arguments, **chosen)
    return function
