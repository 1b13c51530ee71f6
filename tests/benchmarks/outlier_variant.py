"""The same function with outlier channels, as real Llamas have them and small ones do not.

    python -m tests.benchmarks.outlier_variant CHECKPOINT OUT [--channels 4] [--factor 64] [--seed 0]

In each decoder layer a few channels of both norms' gamma are multiplied by a power of two, and the matching columns of
the matrices that read the norm are divided by it. Every product x * w stays what it was, bit for bit; the activations
between norm and matrices have channels that are 64 times too large, and the matrices columns that are 64 times too
small. The final norm stays: its reader may be tied to the embedding.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
NORM_OF = {reader: norm for norm, readers in READERS.items() for reader in readers}


def factors(config: dict[str, int], channels: int, factor: float, seed: int) -> dict[str, torch.Tensor]:
    """Each norm of a decoder layer, `model.layers.0.input_layernorm` ...: what its gamma is multiplied by, [H]."""
    if math.frexp(factor)[0] != 0.5:
        raise ValueError(f"factor {factor} is no power of two: the variant would not be exact")
    random = np.random.default_rng(seed)
    found = {}
    for layer in range(config["num_hidden_layers"]):
        for norm in READERS:
            values = torch.ones(config["hidden_size"])
            values[random.choice(config["hidden_size"], channels, replace=False)] = factor
            found[f"model.layers.{layer}.{norm}"] = values
    return found


def changed(name: str, tensor: torch.Tensor, by_norm: dict[str, torch.Tensor]) -> torch.Tensor:
    """A tensor of the variant, in its stored type; refuses values that would not be exact."""
    module = name.removesuffix(".weight")
    prefix, part = ".".join(module.split(".")[:3]), ".".join(module.split(".")[3:])
    if module in by_norm:
        exact = tensor.double() * by_norm[module]
    elif part in NORM_OF and name.endswith(".weight"):
        exact = tensor.double() / by_norm[f"{prefix}.{NORM_OF[part]}"]
    else:
        return tensor
    stored = exact.to(tensor.dtype)
    if not torch.equal(stored.double(), exact):
        raise ValueError(f"{name} cannot hold the variant's values exactly in {tensor.dtype}")
    return stored


def write_variant(checkpoint: Path, out: Path, channels: int = 4, factor: float = 64.0, seed: int = 0) -> Path:
    """Write the variant's checkpoint directory: its weight files changed, everything else copied."""
    config = json.loads((checkpoint / "config.json").read_text())
    by_norm = factors(config, channels, factor, seed)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(checkpoint.iterdir()):
        if file.suffix != ".safetensors":
            if file.is_file():
                shutil.copy(file, out / file.name)
            continue
        with safe_open(file, "pt") as stored:
            tensors = {name: changed(name, stored.get_tensor(name), by_norm) for name in stored.keys()}  # noqa: SIM118
            save_file(tensors, out / file.name, metadata=stored.metadata())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--factor", type=float, default=64.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write_variant(arguments.checkpoint, arguments.out, arguments.channels, arguments.factor, arguments.seed))


if __name__ == "__main__":
    main()
