"""Tiny models quantized and exported by modelopt itself, with the largest magnitudes it saw."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

PRESETS = {
    "FP8": "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "W4A16_AWQ": "INT4_AWQ_CFG",
    "W4A8_AWQ": "W4A8_AWQ_BETA_CFG",
    "W4A16": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
}


@dataclass
class Export:
    """A directory that modelopt wrote, the quantized model before it was exported, and what it was calibrated with:
    max|x| of each matrix's input, seen by hooks of ours, and of keys and values, seen by modelopt."""

    path: Path
    model: Any
    input_amax: dict[str, float] = field(default_factory=dict)
    kv_amax: dict[int, tuple[float, float]] = field(default_factory=dict)

    def weight(self, module: str) -> torch.Tensor:
        """What modelopt computes with in the place of a matrix: float32."""
        found = self.model.get_submodule(module)
        with torch.no_grad():
            return found.weight_quantizer(found.weight).float()


def exported(
    checkpoint: Path, out: Path, algorithm: str, kv_cache: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Export:
    """Calibrate on fixed ids and export. `algorithm` is ModelOpt's name of it; `W4A16` is int4 without AWQ's search."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

    config = copy.deepcopy(getattr(mtq, PRESETS[algorithm]))
    if kv_cache:
        config = update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    amax = _input_amax(model)
    model = mtq.quantize(model, config, forward_loop=_forward)
    found = Export(out, model, amax)
    if kv_cache:
        for layer, block in enumerate(model.model.layers):
            attention = block.self_attn
            found.kv_amax[layer] = (float(attention.k_bmm_quantizer.amax), float(attention.v_bmm_quantizer.amax))
    with torch.inference_mode():
        export_hf_checkpoint(copy.deepcopy(model), export_dir=out)
    return found


IDS = torch.randint(0, 320, (6, 24), generator=torch.Generator().manual_seed(11))
"""What everything here is calibrated on."""


def _forward(model: Any) -> None:
    with torch.no_grad():
        for pair in IDS.split(2):
            model(pair)


def _input_amax(model: Any) -> dict[str, float]:
    seen: dict[str, float] = {}

    def hook(name: str) -> Any:
        def see(module: Any, inputs: Any) -> None:
            seen[name] = max(seen.get(name, 0.0), float(inputs[0].abs().max()))

        return see

    linears = [(name, each) for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)]
    handles = [each.register_forward_pre_hook(hook(name)) for name, each in linears]
    _forward(model)
    for handle in handles:
        handle.remove()
    return seen
