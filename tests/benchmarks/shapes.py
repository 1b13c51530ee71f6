"""The named shapes of random checkpoints: published Llamas, and tiny ones of the same families."""

from typing import Any

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _config(
    vocabulary: int, hidden: int, intermediate: int, layers: int, heads: tuple[int, int], **fields: Any
) -> dict[str, Any]:
    """A config.json; `heads` are query and key/value heads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": hidden // heads[0],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        **fields,
    }


def _llama3(factor: float) -> dict[str, Any]:
    return {"max_position_embeddings": 131072, "rope_parameters": {**LLAMA3_SCALING, "factor": factor}}


_LLAMA2 = {"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny-llama-2": _config(1024, 256, 704, 3, (8, 8), **_LLAMA2),
    "tiny-llama-3": _config(1031, 256, 768, 2, (8, 2), **_llama3(8.0)),
    "tiny-llama-3-tied": _config(1024, 256, 768, 2, (4, 1), tie_word_embeddings=True, **_llama3(32.0)),
    "llama-3.2-1b": _config(128256, 2048, 8192, 16, (32, 8), tie_word_embeddings=True, **_llama3(32.0)),
    "llama-3.2-3b": _config(128256, 3072, 8192, 28, (24, 8), tie_word_embeddings=True, **_llama3(32.0)),
    "llama-2-7b": _config(32000, 4096, 11008, 32, (32, 32), **_LLAMA2),
    "llama-3.1-8b": _config(128256, 4096, 14336, 32, (32, 8), **_llama3(8.0)),
}
