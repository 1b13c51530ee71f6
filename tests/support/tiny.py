"""Tiny random Llama checkpoints in every shape the project claims, written through transformers itself."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# Name -> what differs from BASE. Each stands for a family of published checkpoints.
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 32},
    "odd_vocabulary": {"vocab_size": 333},
    "eos_list": {"eos_token_id": [1, 2, 5]},
    "mqa_three_layers": {"num_key_value_heads": 1, "num_hidden_layers": 3},
}


def tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on this very file."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([Path(__file__).read_text()], trainer)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", chat_template=template)


def write_checkpoint(
    out: Path,
    shape: str = "gqa",
    dtype: torch.dtype = torch.bfloat16,
    shard: str = "1GB",
    gain: float = 1.5,
    **changes: Any,
) -> Path:
    """Write a seeded random checkpoint with a tokenizer; `changes` override config fields.

    Norm weights and biases are random too, so that a forgotten one shows, and weights are large
    enough that attention and logits are far from uniform: `gain` is the growth of a vector's norm in a matrix.
    A gain of 0.5 makes a model that bears quantization as trained ones do.
    """
    config = LlamaConfig(**{**BASE, **SHAPES[shape], **changes})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(std=gain * parameter.shape[1] ** -0.5)
    model.to(dtype).save_pretrained(out, max_shard_size=shard)
    tokenizer().save_pretrained(out)
    return out
