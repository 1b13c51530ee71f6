"""The forms of checkpoint, and what each calls the precisions that it can hold."""

from calibration.coverage import actual_precision
from exporter.core.config import ModelConfig
from exporter.core.engine_options import EngineOptions
from exporter.core.recipe import CHANNEL, TENSOR, Precision, Recipe

HF, LEGACY, COMPRESSED = "hf", "trtllm", "compressed-tensors"
FORMS = (HF, LEGACY, COMPRESSED)
FLOAT_TYPES = {"bf16": "BF16", "fp16": "F16"}
"""Types of floats in the files, by the kind of precision."""
TORCH_TYPES = {"bfloat16": "bf16", "float16": "fp16"}
AWQ_GROUPS = (64, 128)
"""Groups that TensorRT-LLM's kernels of 4-bit weights with 16-bit activations take (fpA_intB_gemm)."""
W4A8_GROUPS = (128,)
"""The same with FP8 activations: the Hopper kernels have groups of 128 alone."""
WNA16_GROUPS = (32, 64, 128, CHANNEL)
"""vLLM's Marlin kernels (MARLIN_SUPPORTED_GROUP_SIZES in model_executor/layers/quantization/utils/marlin_utils.py)."""


def form_of(engine: EngineOptions) -> str:
    """Which form is written."""
    return engine.format or HF


def checkpoint_kind(config: ModelConfig | None) -> str:
    """The float type of the checkpoint as a kind of precision; bf16 for float32, unnamed and unknown ones.

    Servers compute in 16 bits. bf16 has the range of float32, so that no weight overflows, and is what vLLM and
    TensorRT-LLM take for such checkpoints themselves.
    """
    if config is None:
        return "bf16"
    named = str(config.raw.get("dtype") or config.raw.get("torch_dtype") or "").removeprefix("torch.")
    return TORCH_TYPES.get(named, "bf16")


def float_kind(config: ModelConfig | None, recipe: Recipe) -> str:
    """The float type of all that is not quantized: the recipe's where its layers are floats, else the checkpoint's."""
    return recipe.linear.kind if recipe.linear.kind in FLOAT_TYPES else checkpoint_kind(config)


def matrix_precisions(config: ModelConfig, recipe: Recipe) -> dict[str, Precision]:
    """What each matrix of the layers is stored in, by module (`model.layers.0.self_attn.q_proj`)."""
    return {
        f"model.layers.{layer}.{name}": actual_precision(recipe.layer_precision(layer, name), width)
        for layer in range(config.num_layers)
        for name, (_, width) in config.linear_shapes.items()
    }


def hf_algorithm(precision: Precision) -> str | None:
    """ModelOpt's `quant_algo`; None for what the form does not hold."""
    if not precision.symmetric:
        return None
    found = {
        ("fp8", TENSOR, "fp8/tensor"): "FP8",
        ("fp8", CHANNEL, "fp8/token"): "FP8_PER_CHANNEL_PER_TOKEN",
        ("nvfp4", 16, "nvfp4/tensor"): "NVFP4",
        **{("int4", group, ""): "W4A16_AWQ" for group in AWQ_GROUPS},
        **{("int4", group, "fp8/tensor"): "W4A8_AWQ" for group in W4A8_GROUPS},
    }
    return found.get((precision.kind, precision.group_size or 0, precision.activations))


def compressed_format(precision: Precision) -> str | None:
    """The `format` of compressed-tensors; None for what vLLM has no kernel for."""
    if not precision.symmetric:
        return None
    key = (precision.kind, precision.group_size, precision.activations)
    if key in (("fp8", TENSOR, "fp8/tensor"), ("fp8", CHANNEL, "fp8/token")):
        return "float-quantized"
    if key in (("int8", CHANNEL, "int8/token"), ("int8", CHANNEL, "int8/tensor")):
        return "int-quantized"
    if precision.kind in ("int4", "int8") and precision.group_size in WNA16_GROUPS and not precision.activations:
        return "pack-quantized"
    return "nvfp4-pack-quantized" if precision.kind == "nvfp4" else None


def legacy_algorithm(precision: Precision) -> str | None:
    """`quant_algo` of TensorRT-LLM checkpoints (tensorrt_llm/quantization/mode.py); None for what they do not hold."""
    if not precision.symmetric:
        return None
    found = {
        ("fp8", TENSOR, "fp8/tensor"): "FP8",
        ("fp8", CHANNEL, "fp8/token"): "FP8_PER_CHANNEL_PER_TOKEN",
        ("int8", CHANNEL, ""): "W8A16",
        ("int4", CHANNEL, ""): "W4A16",
        ("int8", CHANNEL, "int8/tensor"): "W8A8_SQ_PER_CHANNEL",
        ("int8", CHANNEL, "int8/token"): "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
        **{("int4", group, ""): "W4A16_AWQ" for group in AWQ_GROUPS},
        **{("int4", group, "fp8/tensor"): "W4A8_AWQ" for group in W4A8_GROUPS},
    }
    return found.get((precision.kind, precision.group_size or 0, precision.activations))


def matrix_bits(precision: Precision, rows: int, width: int) -> int:
    """Bits of a matrix [rows, width] in the files: codes, scales (float32; E4M3 in nvfp4), and 64 bits for those of its
    input and of the whole matrix. compressed-tensors has the scales of packed codes in 16 bits, counted so for groups
    of 32, which no other form has; with larger groups it takes a little less than this."""
    if not precision.is_coded:
        return rows * width * min(precision.bits, 16)
    scales = 1 if precision.group_size == TENSOR else rows * precision.groups(width)
    wide = 8 if precision.kind == "nvfp4" else 16 if precision.group_size == min(WNA16_GROUPS[:3]) else 32
    return rows * width * precision.bits + scales * wide + 64
