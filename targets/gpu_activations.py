"""Roundings of activations that GPUs have kernels for and CPUs do not: what CPU targets answer to them."""

from exporter.core.recipe import Precision
from exporter.core.support import Support

GPU_ONLY = {("int4", "fp8/tensor"), ("nvfp4", "nvfp4/tensor")}
REMEDY = 'set activations = "" in the recipe (the kernels then round to int8 by themselves), or use a GPU target'


def refused_on_cpus(precision: Precision) -> Support | None:
    """The refusal of a precision whose activations no CPU kernel takes; None for all others."""
    if (precision.kind, precision.activations) not in GPU_ONLY:
        return None
    why = f"no CPU kernel multiplies {precision.kind} weights by {precision.activations} activations"
    return Support("refused", why, REMEDY)
