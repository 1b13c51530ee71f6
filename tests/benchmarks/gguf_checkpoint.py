"""A Llama checkpoint as a GGUF file in float16, for llama-quantize. Runs in the peers' environment (package gguf).

python gguf_checkpoint.py CHECKPOINT OUT.gguf [--exact]

`--exact` stores float32 and a byte-level BPE tokenizer, for llama-imatrix and for weights that float16 cannot hold.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order of llama.cpp's rotary embedding (pairs side by side)."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `interleaved`."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def gguf_name(name: str) -> str:
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(part)]}.{kind}"


def add_tokenizer(writer: Any, checkpoint: Path) -> None:
    """A byte-level BPE vocabulary split by GPT-2's pattern, as tokenizer.json of the example has it."""
    import gguf

    stored = json.loads((checkpoint / "tokenizer.json").read_text())
    config = json.loads((checkpoint / "config.json").read_text())
    vocabulary = {**stored["model"]["vocab"], **{token["content"]: token["id"] for token in stored["added_tokens"]}}
    special = {token["id"] for token in stored["added_tokens"] if token["special"]}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    eos = config["eos_token_id"]
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)
    writer.add_add_bos_token(False)


def write(checkpoint: Path, out: Path, exact: bool = False) -> None:
    import gguf
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(min(config["max_position_embeddings"], 8192))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if exact:
        add_tokenizer(writer, checkpoint)
    else:
        writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(0 if exact else 1)
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = file.get_tensor(name).float()
                if "q_proj" in name or "k_proj" in name:
                    tensor = interleaved(tensor, heads if "q_proj" in name else kv_heads)
                array = tensor.numpy()
                writer.add_tensor(gguf_name(name), array if array.ndim == 1 or exact else array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--exact", action="store_true")
    arguments = parser.parse_args()
    write(arguments.checkpoint, arguments.out, arguments.exact)
