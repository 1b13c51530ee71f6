"""Run as a program, one process a rank: the layers of rank files as TensorRT-LLM's modules compute them, in float32.

`python rank_process.py RANK IDS CHECKPOINT...`: ids int64 [B, S] from a .npy. For each checkpoint that has such a rank
the processes meet anew; the last stage's first shard writes CHECKPOINT/logits.npy, float32 [B, S, V]. Columns of qkv,
fc and gate, rows of dense and proj with a sum over the shards (all_reduce), embedding and head by the vocabulary
(all_reduce, all_gather), hidden states from stage to stage (send, recv). Weights are decoded here from the safetensors
library's tensors: nothing of ours is imported.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file


class Rank:
    def __init__(self, checkpoint: Path, rank: int) -> None:
        self.config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
        mapping = self.config["mapping"]
        self.tp, self.pp, world = mapping["tp_size"], mapping["pp_size"], mapping["world_size"]
        dist.init_process_group("gloo", init_method=f"file://{checkpoint / 'rendezvous'}", rank=rank, world_size=world)
        # Every process takes part in making every group.
        groups = [dist.new_group(list(range(stage * self.tp, (stage + 1) * self.tp))) for stage in range(self.pp)]
        self.rank, self.stage, self.shard = rank, rank // self.tp, rank % self.tp
        self.group = groups[self.stage]
        self.tensors = load_file(checkpoint / f"rank{rank}.safetensors")

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name].float()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values, group=self.group)
        return values

    def weight(self, name: str) -> torch.Tensor:
        """One rank's matrix [N, K], decoded; factors of inputs are ones in our files."""
        stored, quantization = self.tensors[f"{name}.weight"], self.config["quantization"]
        if quantization["quant_algo"] in ("W4A16_AWQ", "W4A8_AWQ"):
            low, high = stored << 4 >> 4, stored >> 4  # arithmetic shifts keep the sign
            codes = torch.stack([low, high], 1).reshape(-1, stored.shape[1]).float()
            return codes * self.tensor(f"{name}.weights_scaling_factor").repeat_interleave(
                quantization["group_size"], 1
            )
        for scale in ("weights_scaling_factor", "per_channel_scale"):
            if f"{name}.{scale}" in self.tensors:
                return stored.float() * self.tensor(f"{name}.{scale}").reshape(-1, 1)
        return stored.float()

    def linear(self, name: str, hidden: torch.Tensor, cut_inputs: bool = False) -> torch.Tensor:
        out = hidden @ self.weight(name).T
        if cut_inputs:
            out = self.sum(out)
        return out + self.tensor(f"{name}.bias") if f"{name}.bias" in self.tensors else out

    def norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return hidden * torch.rsqrt(variance + self.config["norm_epsilon"]) * self.tensor(f"{name}.weight")

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Each shard has a range of the vocabulary; ids of others are zeros in the sum."""
        table = self.tensor("transformer.vocab_embedding.weight")
        local = ids - self.shard * len(table)
        inside = (local >= 0) & (local < len(table))
        return self.sum(torch.where(inside[..., None], table[local.clamp(0, len(table) - 1)], torch.zeros(1)))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden @ self.tensor("lm_head.weight").T
        parts = [torch.empty_like(logits) for _ in range(self.tp)]
        dist.all_gather(parts, logits, group=self.group)
        return torch.cat(parts, -1)[..., : self.config["vocab_size"]]

    def frequencies(self) -> torch.Tensor:
        config, size = self.config, self.config["head_size"]
        plain = 1.0 / config["rotary_base"] ** (torch.arange(0, size, 2) / size)
        scaling = config["rotary_scaling"]
        if scaling is None:
            return plain
        wavelengths, length = 2 * torch.pi / plain, scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = ((length / wavelengths - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * plain / scaling["factor"] + smooth * plain

    def rotated(self, heads: torch.Tensor) -> torch.Tensor:
        """[B, H, S, D], halves rotated (rope_gpt_neox)."""
        angles = torch.arange(heads.shape[2])[:, None] * self.frequencies()
        cos, sin = (torch.cat([function(angles)] * 2, -1) for function in (torch.cos, torch.sin))
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat([-second, first], -1) * sin

    def attention(self, prefix: str, hidden: torch.Tensor) -> torch.Tensor:
        config, size = self.config, self.config["head_size"]
        queries = config["num_attention_heads"] // self.tp
        keys = max(1, config["num_key_value_heads"] // self.tp)
        qkv = self.linear(f"{prefix}.qkv", hidden).unflatten(-1, (-1, size)).transpose(1, 2)
        q, k, v = qkv.split([queries, keys, keys], 1)
        q, k = self.rotated(q), self.rotated(k)
        k, v = (each.repeat_interleave(queries // keys, 1) for each in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.linear(f"{prefix}.dense", out.transpose(1, 2).flatten(2), cut_inputs=True)

    def layer(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        prefix = f"transformer.layers.{number}"
        hidden = hidden + self.attention(f"{prefix}.attention", self.norm(f"{prefix}.input_layernorm", hidden))
        inner = self.norm(f"{prefix}.post_layernorm", hidden)
        activated = torch.nn.functional.silu(self.linear(f"{prefix}.mlp.fc", inner))
        gated = activated * self.linear(f"{prefix}.mlp.gate", inner)
        return hidden + self.linear(f"{prefix}.mlp.proj", gated, cut_inputs=True)

    def run(self, ids: torch.Tensor) -> torch.Tensor | None:
        hidden = torch.empty((*ids.shape, self.config["hidden_size"]))
        if self.stage == 0:
            hidden = self.embed(ids)
        else:
            dist.recv(hidden, self.rank - self.tp)
        numbers = {int(name.split(".")[2]) for name in self.tensors if name.startswith("transformer.layers.")}
        for number in sorted(numbers):
            hidden = self.layer(number, hidden)
        if self.stage < self.pp - 1:
            dist.send(hidden, self.rank + self.tp)
            return None
        return self.head(self.norm("transformer.ln_f", hidden))


def main(number: str, ids: str, *checkpoints: str) -> None:
    torch.set_num_threads(1)
    for checkpoint in map(Path, checkpoints):
        if not (checkpoint / f"rank{number}.safetensors").exists():
            continue
        rank = Rank(checkpoint, int(number))
        logits = rank.run(torch.from_numpy(np.load(ids)))
        if logits is not None and rank.shard == 0:
            np.save(checkpoint / "logits.npy", logits.numpy())
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
