"""Every limit of the parity contract in one table, each with its reason. Nothing else in the code sets one."""

import math
from dataclasses import dataclass
from functools import reduce

from exporter.core.config import ModelConfig
from exporter.core.recipe import Precision, Recipe


@dataclass(frozen=True)
class EagerLimits:
    """A model against eager: relative L2 of logits, KL in nats, perplexity ratio. None: reported, not gated."""

    relative_l2_error: float | None
    kl_divergence_mean: float
    kl_divergence_max: float | None
    perplexity_ratio: float
    why: str


FP32 = EagerLimits(
    2e-5,
    1e-7,
    1e-6,
    1.0001,
    "the same float32 products summed in another order: 1.6e-6 measured on three random layers, growing slowly "
    "with depth; KL is quadratic in the error, so 1e-7 leaves room for logits far larger than any trained model's",
)
FP16 = EagerLimits(
    3e-3,
    1e-4,
    None,
    1.001,
    "float16 keeps 11 bits: each weight errs by at most 2^-11 = 5e-4, and independent errors add up over depth",
)
BF16 = EagerLimits(
    3e-2, 2e-3, None, 1.005, "bfloat16 keeps 8 bits: 2^-8 = 4e-3 a weight; exact where the checkpoint is bfloat16"
)
INT8 = EagerLimits(
    None, 0.003, None, 1.005, "8-bit codes with a scale per group err by at most 1/254 of the group's largest weight"
)
INT6 = EagerLimits(
    None,
    0.01,
    None,
    1.01,
    "64 levels: a quarter of the step of 4 bits, and KL is quadratic in the step; the share of the int8 activations "
    "stays. 0.0027 measured on the example model with all weights in groups of 64, 0.0015 with the head in 256",
)
W8A8 = EagerLimits(
    None,
    0.02,
    None,
    1.01,
    "8-bit weights times activations in int8 with one scale for a token or for all of them: a few large channels take "
    "the steps of all others, which smoothing evens out, but not wholly",
)
FP8 = EagerLimits(
    None,
    0.02,
    None,
    1.01,
    "E4M3 keeps 4 bits: weights and activations err by at most 2^-4 of themselves, whatever their scale; the errors of "
    "a row's terms are independent and average out",
)
INT4_FINE = EagerLimits(
    None, 0.05, None, 1.05, "16 levels, groups of at most 32; the maximum is reported: one flat position dominates it"
)
INT4_COARSE = EagerLimits(
    None, 0.10, None, 1.10, "16 levels, groups above 32, or whole rows: one outlier coarsens more weights"
)
FP4 = EagerLimits(
    None,
    0.15,
    None,
    1.15,
    "E2M1 has 15 values, the largest 4 and 6: steps there are twice those of 16 even levels. Its scales are rounded as "
    "well: to 4 bits (nvfp4) or to a power of two (mxfp4)",
)
INT8_CACHE = EagerLimits(
    None, 0.003, None, 1.005, "8-bit keys and values, a scale per position and head: the contract's row of int8 weights"
)
FP8_CACHE = EagerLimits(
    None,
    0.003,
    None,
    1.005,
    "keys and values err by at most 2^-4 of themselves; a softmax over many positions averages what int8 gets by "
    "finer steps: the same row",
)

LOCAL_ERROR = 1.5e-6
"""One lossless slice given the reference's own input, relative L2 of its output, for products of up to 256 terms:
measured up to 5.6e-7. Longer float32 sums round more: 1.2e-6 measured at 8192 terms, about their fourth root."""


def local_error(config: ModelConfig) -> float:
    """LOCAL_ERROR for the longest products of a model; also for the values inside a slice when a fault is located."""
    return LOCAL_ERROR * max(1.0, max(config.hidden_size, config.intermediate_size) / 256) ** 0.25


CACHES = {"fp32": FP32, "fp16": FP16, "bf16": BF16, "int8": INT8_CACHE, "fp8": FP8_CACHE}
"""The rows of KV caches: float16 and bfloat16 keys and values err as much as such weights do."""

CHAINED_ERROR = 2e-5
"""Hidden states of a lossless stage that ran on its own from the start: the contract's ceiling for fp32."""

SIMULATION_FP32 = 1e-3
"""Engine against its simulated quantization, where it computes in float32: sums in other orders, fused kernels. With a
rounded KV cache also two ways through one engine: a key near a rounding boundary is stored a step away. 2.3e-4
measured between chunks of 7 and of 128 tokens, at the worst position of the example model.
"""

SIMULATION_COARSE = 1e-2
"""The same where activations are quantized (a value near a rounding boundary flips by a whole step) or arithmetic
is half precision. Also how far two ways through one such engine (decode, chunks, batches) may differ. A flip of an E4M3
code moves a value by an eighth, so it must not come to one: rows of these products add alike, whatever their number.
"""

CHAINED_BF16 = 3e-2
"""Whole calls of an engine's graph in bfloat16 beside its float32 simulation, no slice given the other's input: the
contract's ceiling for bf16. 1e-2 measured on the example, 2.1e-2 on random weights; fp16 stays within 1e-2."""

STORED_FLOATS = 4e-3
"""A tensor of a checkpoint artifact against what it was written from: its codes are the same, its norms, biases and
some forms' scales are rounded to bfloat16 once, by at most 2^-8 each."""

STORED_AGAIN = 5.2e-2
"""The same where the form has one FP8 scale for several matrices, so that each is rounded by it instead of its own. Two
roundings to E4M3, each off by at most half a step of 2^-3 of a value: 2^-4 / sqrt(3) in the mean square, times sqrt(2)
for both, is 5.1e-2. 4.3e-2 measured on the example model."""

SELF_FP32 = 2e-5
"""Two ways through one float32 engine, or one slice of it beside its simulation: the fp32 limit against eager."""


ROWS = {
    "fp32": FP32,
    "fp16": FP16,
    "bf16": BF16,
    "int8": INT8,
    "int6": INT6,
    "fp8": FP8,
    "nvfp4": FP4,
    "mxfp4": FP4,
}
"""The rows of kinds that have one whatever their groups; int8 with a scale for each row errs by more than with one for
32 weights, but stays within the row."""
FINE_GROUP = 32


def eager_limits(recipe: Recipe) -> EagerLimits:
    """The limits that a recipe is held to: those of its weights or of its KV cache, whichever are looser."""
    weights, cache = weight_limits(recipe), CACHES[recipe.kv_cache]
    return weights if cache is FP32 else looser(weights, cache)


def looser(first: EagerLimits, second: EagerLimits) -> EagerLimits:
    """The larger of each limit; what either does not gate is not gated."""

    def larger(one: float | None, other: float | None) -> float | None:
        return None if one is None or other is None else max(one, other)

    return EagerLimits(
        larger(first.relative_l2_error, second.relative_l2_error),
        max(first.kl_divergence_mean, second.kl_divergence_mean),
        larger(first.kl_divergence_max, second.kl_divergence_max),
        max(first.perplexity_ratio, second.perplexity_ratio),
        first.why if first.kl_divergence_mean >= second.kl_divergence_mean else second.why,
    )


def weight_limits(recipe: Recipe) -> EagerLimits:
    """The row of the table for a recipe's weights: that of its coarsest precision, limit by limit."""
    return reduce(looser, dict.fromkeys(precision_limits(precision) for precision in recipe.precisions))


def precision_limits(precision: Precision) -> EagerLimits:
    """The row of one precision; 4-bit ones by the size of their groups."""
    if precision.kind in ("int4", "nf4"):
        fine = 0 < (precision.group_size or 0) <= FINE_GROUP
        return INT4_FINE if fine else INT4_COARSE
    row = ROWS[precision.kind]
    return looser(row, W8A8) if precision.activations else row


@dataclass(frozen=True)
class EngineLimits:
    """An engine against its simulation, and against itself on another way through its cache."""

    simulation: float
    consistency: float


def engine_limits(recipe: Recipe, *, rounded_activations: bool, half_arithmetic: bool = False) -> EngineLimits:
    """`rounded_activations`: the engine rounds what matrices multiply, to int8, E4M3 or E2M1."""
    if rounded_activations or half_arithmetic:
        return EngineLimits(SIMULATION_COARSE, SIMULATION_COARSE)
    if recipe.kv_cache != "fp32":
        return EngineLimits(SIMULATION_FP32, SIMULATION_FP32)
    floats = not any(precision.is_coded for precision in recipe.precisions)
    return EngineLimits(SELF_FP32 if floats else SIMULATION_FP32, SELF_FP32)


def within(value: float, limit: float | None) -> bool:
    """Whether a measured value passes. NaN and infinity never do, even where nothing is gated."""
    return math.isfinite(value) and (limit is None or value <= limit)
