"""`genai_config.json`, by which onnxruntime-genai knows how to run the engine (its src/config.h)."""

import json

from exporter.core.config import ModelConfig
from targets.base import Limits


def genai_config(config: ModelConfig, limits: Limits, filename: str) -> str:
    """The file's text. Greedy search over the whole context by default; callers override `search` at run time."""
    model = {
        "type": "llama",
        "vocab_size": config.vocab_size,
        "context_length": limits.max_seq_len,
        **_special_tokens(config),
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "log_severity_level": 3, "provider_options": []},
            "filename": filename,
            "hidden_size": config.hidden_size,
            "head_size": config.head_dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search = {
        "do_sample": False,
        "max_length": limits.max_seq_len,
        "min_length": 0,
        "num_beams": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": min(50, config.vocab_size),
        "top_p": 1.0,
    }
    return json.dumps({"model": model, "search": search}, indent=2, sort_keys=True) + "\n"


def _special_tokens(config: ModelConfig) -> dict[str, object]:
    """eos, bos and pad, each a token of the vocabulary, for onnxruntime-genai refuses an eos outside of it.

    A checkpoint without eos gets the token least likely to be generated: bos, or else the last of the vocabulary.
    Padding, from which onnxruntime-genai derives the mask of ragged prompts, falls back to the first eos.
    """
    spare = config.bos_token_id if config.bos_token_id is not None else config.vocab_size - 1
    eos = list(config.eos_token_ids) or [spare]
    return {
        "eos_token_id": eos,
        "bos_token_id": spare,
        "pad_token_id": config.pad_token_id if config.pad_token_id is not None else eos[0],
    }
