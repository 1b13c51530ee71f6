"""Servers of quantized Hugging Face checkpoints: TensorRT-LLM, vLLM, SGLang, and who of them takes which format.

Read in: TensorRT-LLM tensorrt_llm/commands/serve.py (flags), _torch/modules/linear.py get_quant_method (algorithms),
_torch/model_config.py load_hf_quant_config (compressed-tensors), docs/source/features/quantization.md (GPUs);
vLLM 0.33 vllm/engine/arg_utils.py, model_executor/layers/quantization/modelopt.py LINEAR_ALGOS,
compressed_tensors/schemes; SGLang 0.5.23 srt/arg_groups/fields, srt/layers/quantization/modelopt_quant.py,
compressed_tensors/schemes. None of them was run.
"""

from exporter.handoff.checkpoint_facts import COMPRESSED, HF
from exporter.handoff.facts import ServingFacts
from exporter.handoff.route import ENGINE_DIR, Route

TRTLLM_ALGORITHMS = ("", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_AWQ", "W4A8_AWQ")
VLLM_MODELOPT = {"FP8": "modelopt", "FP8_PER_CHANNEL_PER_TOKEN": "modelopt"}
VLLM_MODELOPT |= {"NVFP4": "modelopt_fp4", "W4A16_NVFP4": "modelopt_fp4"}
SGLANG_MODELOPT = {"FP8": "modelopt_fp8", "NVFP4": "modelopt_fp4", "W4A16_NVFP4": "modelopt_fp4"}
SGLANG_COMPRESSED = (
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_WEIGHT_ONLY",
    "W8A8_INT8",
    "W4A16",
    "W8A16",
    "NVFP4",
    "W4A16_NVFP4",
)
# From TensorRT-LLM's table of hardware; the kernels of vLLM and SGLang differ, and fall back in places.
GPUS = {
    "FP8": "Ada Lovelace, Hopper, Blackwell",
    "FP8_PER_CHANNEL_PER_TOKEN": "Hopper",
    "NVFP4": "Blackwell",
    "W4A16_AWQ": "Ampere, Ada Lovelace, Hopper",
    "W4A8_AWQ": "Ada Lovelace, Hopper",
}
TRTLLM_READ = "TensorRT-LLM 1.2 and 1.3 (tensorrt_llm/commands/serve.py)"
VLLM_READ = "vLLM 0.33 (vllm/engine/arg_utils.py, layers/quantization/modelopt.py)"
SGLANG_READ = "SGLang 0.5.23 (sglang/srt/arg_groups, layers/quantization/modelopt_quant.py)"


def checkpoint_routes(facts: ServingFacts) -> tuple[Route, ...]:
    """Every server of Hugging Face checkpoints, those that do not take this one with the reason."""
    return (trtllm_serve(facts), vllm_serve(facts), sglang(facts))


def trtllm_serve(facts: ServingFacts) -> Route:
    """TensorRT-LLM's PyTorch backend. The precision of the KV cache comes from the checkpoint (`auto`)."""
    name, title = "trtllm-serve", "TensorRT-LLM (PyTorch backend)"
    if why := _trtllm_refusal(facts):
        return Route(name, title, why=why, checked=TRTLLM_READ)
    command = ("trtllm-serve", ENGINE_DIR, "--backend", "pytorch")
    limits = ("--max_batch_size", str(facts.max_batch), "--max_seq_len", str(facts.max_seq_len))
    gpus = GPUS.get(facts.checkpoint.algorithm)
    notes = (f"GPUs that compute {facts.checkpoint.algorithm}: {gpus}.",) if gpus else ()
    return Route(name, title, ((*command, *limits),), notes=(*notes, _over_gpus("--tp_size")), checked=TRTLLM_READ)


def _trtllm_refusal(facts: ServingFacts) -> str:
    found = facts.checkpoint
    if found.form == COMPRESSED and found.algorithm == "W8A8_INT8":
        return (
            "of compressed-tensors it reads FP8 alone, and looks at the number of bits only: it would take these int8 "
            "codes for FP8. Do not load it there"
        )
    if found.form == COMPRESSED and found.algorithm != "FP8_PER_CHANNEL_PER_TOKEN":
        return "of compressed-tensors it reads FP8 with a scale for each channel and token alone; use --format hf"
    if found.algorithm not in TRTLLM_ALGORITHMS:
        return f"its PyTorch backend has no {found.algorithm}"
    return ""


def vllm_serve(facts: ServingFacts) -> Route:
    """vLLM: ModelOpt's FP8 and NVFP4, and everything that compressed-tensors holds."""
    name, title = "vllm", "vLLM"
    found = facts.checkpoint
    method = COMPRESSED if found.form == COMPRESSED else VLLM_MODELOPT.get(found.algorithm, "")
    if found.algorithm and not method:
        why = f"its ModelOpt loader has no {found.algorithm}; build with --format compressed-tensors"
        return Route(name, title, why=why, checked=VLLM_READ)
    command = [
        *("vllm", "serve", ENGINE_DIR),
        *(("--quantization", method) if found.algorithm else ()),
        *(("--kv-cache-dtype", "fp8") if found.fp8_cache else ()),
        *("--max-model-len", str(facts.max_seq_len), "--max-num-seqs", str(facts.max_batch)),
    ]
    return Route(name, title, (tuple(command),), notes=(_over_gpus("--tensor-parallel-size"),), checked=VLLM_READ)


def sglang(facts: ServingFacts) -> Route:
    """SGLang: ModelOpt's FP8 and NVFP4; compressed-tensors is named by config.json, not by a flag."""
    name, title = "sglang", "SGLang"
    found = facts.checkpoint
    method = SGLANG_MODELOPT.get(found.algorithm, "") if found.form == HF else ""
    takes = not found.algorithm or (found.algorithm in SGLANG_COMPRESSED if found.form == COMPRESSED else method)
    if not takes:
        other = "build with --format compressed-tensors" if found.form == HF else "use another recipe"
        return Route(name, title, why=f"its loader has no {found.algorithm}; {other}", checked=SGLANG_READ)
    command = [
        *("python", "-m", "sglang.launch_server", "--model-path", ENGINE_DIR),
        *(("--quantization", method) if method else ()),
        *(("--kv-cache-dtype", "fp8_e4m3") if found.fp8_cache else ()),
        *("--context-length", str(facts.max_seq_len), "--max-running-requests", str(facts.max_batch)),
    ]
    return Route(name, title, (tuple(command),), notes=(_over_gpus("--tp-size"),), checked=SGLANG_READ)


def _over_gpus(flag: str) -> str:
    """Hugging Face checkpoints are whole files whatever the number of GPUs."""
    return f"Over N GPUs add `{flag} N`: the server cuts the checkpoint as it loads it."
