"""Run as a program: modelopt quantizes a tiny Llama and exports it as TensorRT-LLM checkpoints.

`python modelopt_rank_files.py CHECKPOINT OUT CASE...` writes for each case (`FP8-2-1`: configuration, tp, pp) the
export, and the weights as modelopt's fake quantization has them (weights.safetensors, float32, by Hugging Face name,
factors of inputs multiplied in).
"""

import copy
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_tensorrt_llm_checkpoint
from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

IDS = torch.arange(64).reshape(2, 32) * 5 % 333


def configurations() -> dict[str, Any]:
    """Without searches: the checkpoint's own weights, scales from absolute maxima."""
    plain_w4a8 = copy.deepcopy(mtq.W4A8_AWQ_BETA_CFG)
    plain_w4a8["algorithm"] = "max"
    return {
        "bf16": None,
        "FP8": mtq.FP8_DEFAULT_CFG,
        "FP8_KV": update_quant_cfg_with_kv_cache_quant(copy.deepcopy(mtq.FP8_DEFAULT_CFG), mtq.FP8_KV_CFG["quant_cfg"]),
        "FP8_PER_CHANNEL_PER_TOKEN": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
        "W8A8_SQ_PER_CHANNEL": mtq.INT8_DEFAULT_CFG,
        "SMOOTHQUANT": mtq.INT8_SMOOTHQUANT_CFG,
        "W4A16_AWQ": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
        "AWQ": mtq.INT4_AWQ_CFG,
        "W4A8_AWQ": plain_w4a8,
    }


def fake_quantized(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = {}
    for name, module in model.named_modules():
        if "_proj" in name and hasattr(module, "weight_quantizer") and not name.endswith("quantizer"):
            quantizer = module.weight_quantizer
            # W4A8 has a second one behind it, for E4M3 at run time.
            first = quantizer[0] if isinstance(quantizer, mtq.nn.SequentialQuantizer) else quantizer
            # In float32, as the exporter rounds: in bfloat16 some weights fall on the other side of a border.
            weight = first(module.weight.float()).detach().float()
            factor = getattr(module.input_quantizer, "pre_quant_scale", None)
            weights[f"{name}.weight"] = (weight if factor is None else weight * factor.float()).contiguous()
    return weights


def main(checkpoint: str, out: str, *cases: str) -> None:
    for case in cases:
        name, tp, pp = case.split("-")
        model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        model.config.architectures = ["LlamaForCausalLM"]
        if (chosen := configurations()[name]) is not None:
            model = mtq.quantize(model, chosen, forward_loop=lambda model: model(IDS))
        directory = Path(out) / case
        with torch.inference_mode():
            weights = fake_quantized(model)
            export_tensorrt_llm_checkpoint(
                model,
                decoder_type="llama",
                dtype=torch.bfloat16,
                export_dir=directory,
                inference_tensor_parallel=int(tp),
                inference_pipeline_parallel=int(pp),
            )
        save_file(weights, directory / "weights.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
