"""A ModelConfig as the JSON object inside a manifest, in the field names of config.json."""

from typing import Any

from exporter.artifact.json_fields import damaged
from exporter.core.config import ModelConfig, parse_config
from exporter.core.errors import EngineSmithError

ARCHITECTURE = "LlamaForCausalLM"


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Every fact that running the engine needs; token ids stand elsewhere in the manifest."""
    rope: dict[str, Any] = {"rope_type": config.rope.type, "rope_theta": config.rope.theta}
    if config.rope.type != "default":
        rope["factor"] = config.rope.factor
    if config.rope.type == "llama3":
        rope["low_freq_factor"] = config.rope.low_freq_factor
        rope["high_freq_factor"] = config.rope.high_freq_factor
        rope["original_max_position_embeddings"] = config.rope.original_max_position_embeddings
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def config_from_json(
    value: dict[str, Any], eos_token_ids: list[Any], bos_token_id: int | None, pad_token_id: int | None
) -> ModelConfig:
    """The inverse, checked by the very rules that checkpoints go through. Raises ArtifactError."""
    raw = {
        **value,
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "eos_token_id": eos_token_ids,
        "bos_token_id": bos_token_id,
        "pad_token_id": pad_token_id,
    }
    try:
        return parse_config(raw)
    except (EngineSmithError, ArithmeticError, TypeError, ValueError) as error:
        raise damaged(f"its model configuration is impossible ({error})") from error
