"""The architecture of a Llama checkpoint, read from its config.json and checked field by field."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.core.errors import InputError, UnsupportedError
from exporter.core.strict_json import parse_json, shorten

if TYPE_CHECKING:
    # Not at run time: the command line reads this module before it knows whether any numbers are wanted.
    import numpy as np

MAX_CONFIG_BYTES = 4 << 20
# Far beyond any Llama; larger values mean a damaged or hostile file.
LIMITS = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 19,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 26,
    "original_max_position_embeddings": 1 << 26,
}
# Arithmetic is float32: beyond these, frequencies (1 / theta / factor) would turn into zero or infinity.
SMALLEST, LARGEST = 1e-12, 1e12


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: `default`, `linear` or `llama3` (transformers' `rope_parameters`)."""

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def inverse_frequencies(self, head_dim: int) -> "np.ndarray":
        """float32 [head_dim / 2], as transformers' `ROPE_INIT_FUNCTIONS` computes them."""
        from exporter.core.rope import inverse_frequencies

        return inverse_frequencies(self, head_dim)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one LlamaForCausalLM. `raw` is the config.json it came from.

    `head_rows`: the rows of the output head, where it has others than the vocabulary (a classifier's labels:
    `exporter.core.labelled`); such a head is never tied.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    raw: dict[str, Any]
    head_rows: int | None = None

    @staticmethod
    def from_directory(path: Path) -> "ModelConfig":
        """Read `config.json` (and the token ids of `generation_config.json`) of a checkpoint directory."""
        if not path.is_dir():
            what = "is a file, not a checkpoint directory" if path.exists() else "does not exist"
            raise InputError(
                "checkpoint.missing",
                f"{path} {what}",
                "give the path of a Hugging Face checkpoint directory (with config.json and *.safetensors)",
            )
        config = parse_config(read_json(path / "config.json", "checkpoint.config"))
        generation = path / "generation_config.json"
        if generation.exists():
            eos = read_json(generation, "checkpoint.config").get("eos_token_id")
            if eos is not None:
                ids = _token_ids(eos, config.vocab_size)
                config = ModelConfig(**{**config.__dict__, "eos_token_ids": ids})
        return config

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Each matrix of a decoder layer, `self_attn.q_proj` ..., as (out features N, in features K)."""
        hidden, wide = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a checkpoint of this shape must hold, by its Hugging Face name."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, shape in self.linear_shapes.items():
                shapes[f"{prefix}{name}.weight"] = shape
                if self.attention_bias if name.startswith("self_attn") else self.mlp_bias:
                    shapes[f"{prefix}{name}.bias"] = shape[:1]
            shapes[f"{prefix}input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"{prefix}post_attention_layernorm.weight"] = (self.hidden_size,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.head_size, self.hidden_size)
        return shapes

    @property
    def head_size(self) -> int:
        """Logits of a position: one for each token, or for each label."""
        return self.vocab_size if self.head_rows is None else self.head_rows

    @property
    def classifies(self) -> bool:
        """Whether the head has rows for labels alone."""
        return self.head_rows is not None

    @property
    def head_source(self) -> str:
        """The checkpoint tensor that the output head multiplies with."""
        return "model.embed_tokens.weight" if self.tie_word_embeddings else "lm_head.weight"

    @property
    def parameter_count(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes.values())


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """One JSON object from a file, with the file's name in every complaint."""
    if not path.is_file():
        raise InputError(kind, f"{path.name} is missing in {path.parent}", "is this a checkpoint directory?")
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise InputError(kind, f"{path.name} is larger than {MAX_CONFIG_BYTES} bytes", "is it the right file?")
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(kind, f"{path.name} cannot be read: {error}", "export or download it again") from error
    if not isinstance(value, dict):
        raise InputError(kind, f"{path.name} holds a {type(value).__name__}, not an object", "export it again")
    return value


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """Check a config.json object and turn it into a ModelConfig; refuses what is not a plain Llama."""
    _require_llama(raw)
    heads = _positive(raw, "num_attention_heads")
    hidden = _positive(raw, "hidden_size")
    kv_heads = _positive(raw, "num_key_value_heads", default=heads)
    head_dim = _positive(raw, "head_dim", default=hidden // heads)
    if heads % kv_heads:
        raise _bad("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if hidden % heads:
        raise _bad("hidden_size", f"{hidden} is not a multiple of num_attention_heads {heads}")
    if head_dim % 2:
        raise _bad("head_dim", f"{head_dim} is odd; rotary embedding needs pairs")
    vocabulary = _positive(raw, "vocab_size")
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_layers=_positive(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_positive(raw, "max_position_embeddings", default=2048),
        rms_norm_eps=_positive_float(raw, "rms_norm_eps", 1e-6),
        rope=_parse_rope(raw),
        attention_bias=_boolean(raw, "attention_bias"),
        mlp_bias=_boolean(raw, "mlp_bias"),
        tie_word_embeddings=_boolean(raw, "tie_word_embeddings"),
        bos_token_id=_optional_id(raw, "bos_token_id", vocabulary),
        eos_token_ids=_token_ids(raw.get("eos_token_id"), vocabulary),
        pad_token_id=_optional_id(raw, "pad_token_id", vocabulary),
        raw=raw,
    )


def _require_llama(raw: dict[str, Any]) -> None:
    names = raw.get("architectures") or []
    shown = ", ".join(map(str, names)) if isinstance(names, list) and names else str(names or raw.get("model_type"))
    if names != ["LlamaForCausalLM"] and not (not names and raw.get("model_type") == "llama"):
        raise UnsupportedError(
            "architecture.unsupported",
            f"architecture {shown[:80]} is not supported",
            "enginesmith builds LlamaForCausalLM; other architectures are refused until they are tested",
        )
    if raw.get("model_type", "llama") != "llama":
        raise UnsupportedError(
            "architecture.unsupported",
            f"model_type {shorten(raw['model_type'])} is not supported, whatever `architectures` says",
            "enginesmith builds models of type llama",
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedError(
            "architecture.activation", f"activation {shorten(raw['hidden_act'])} is not supported", "supported: silu"
        )
    if raw.get("quantization_config") or raw.get("compression_config"):
        raise UnsupportedError(
            "checkpoint.quantized", "the checkpoint is already quantized", "build from the original float checkpoint"
        )


def _parse_rope(raw: dict[str, Any]) -> RopeConfig:
    """Both forms, merged as transformers' `RotaryEmbeddingConfigMixin` does: `rope_scaling` with `rope_theta`
    beside it, else `rope_parameters`."""
    parameters = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise _bad("rope_parameters", f"{shorten(parameters)} is not an object")
    outside = {name: raw[name] for name in ("rope_theta", "partial_rotary_factor") if raw.get(name) is not None}
    merged = {**outside, **parameters}
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedError(
            "architecture.rope", f"rope type {shorten(kind)} is not supported", "supported: default, linear, llama3"
        )
    if merged.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UnsupportedError(
            "architecture.rope",
            f"partial rotary embedding ({shorten(merged['partial_rotary_factor'])}) is not supported",
            "supported: rotary embedding over the whole head",
        )
    theta = _positive_float(merged, "rope_theta", 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = _positive_float(merged, "factor", None)
    return RopeConfig("linear", theta, factor) if kind == "linear" else _llama3_rope(raw, merged, theta, factor)


def _llama3_rope(raw: dict[str, Any], merged: dict[str, Any], theta: float, factor: float) -> RopeConfig:
    low = _positive_float(merged, "low_freq_factor", None)
    high = _positive_float(merged, "high_freq_factor", None)
    if high <= low:
        raise _bad("high_freq_factor", f"{high} is not above low_freq_factor {low}")
    # The first that is given, in the order of transformers' `standardize_rope_params`.
    name = "original_max_position_embeddings"
    given = [source[key] for source, key in ((raw, name), (merged, name)) if source.get(key) is not None]
    original = given[0] if given else _positive(raw, "max_position_embeddings", 2048)
    return RopeConfig("llama3", theta, factor, low, high, _positive({name: original}, name))


def _positive(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if value is None:
        raise _bad(name, "it is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LIMITS[name]:
        raise _bad(name, f"{shorten(value)} is not a whole number from 1 to {LIMITS[name]}")
    return value


def _positive_float(raw: dict[str, Any], name: str, default: float | None) -> float:
    value = raw.get(name)
    if value is None:
        value = default
    if value is None:
        raise _bad(name, "it is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not SMALLEST <= value <= LARGEST:
        raise _bad(name, f"{shorten(value)} is not a number from {SMALLEST} to {LARGEST}")
    return float(value)


def _boolean(raw: dict[str, Any], name: str) -> bool:
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise _bad(name, f"{shorten(value)} is not true or false")
    return value


def _optional_id(raw: dict[str, Any], name: str, vocabulary: int) -> int | None:
    ids = _token_ids(raw.get(name), vocabulary)
    return ids[0] if ids else None


def _token_ids(value: Any, vocabulary: int) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise _bad("token id", f"{shorten(token)} is not a token id")
    # Published checkpoints use -1 or ids beyond the vocabulary for "none" (pad_token_id of early Llamas).
    return tuple(token for token in ids if 0 <= token < vocabulary)


def _bad(name: str, why: str) -> InputError:
    return InputError("checkpoint.config", f"config.json: {name}: {why}", "correct config.json or export it again")
