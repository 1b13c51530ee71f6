"""What searching for scales wins over plain ones, for each kind of weight that is rounded to nearest.

    python -m tests.benchmarks.scale_search examples/stdlib-llama [--window 512] [--windows 16]

`squared error`: what is left of that of abs-max scales, on Gaussian weights. KL: eager model to the same model with its
decoder layers' matrices rounded, on windows of the held-out text; plain is abs-max, searched what recipes store.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from calibration.presets import parse_precision
from calibration.rtn import absmax_rows, quantize_rows
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows
from tests.benchmarks.quality import windows
from tests.benchmarks.report import show

PRECISIONS = (
    "int4/g32",
    "int4/g128",
    "int4/channel",
    "nf4/g64",
    "nf4/g32",
    "nvfp4",
    "mxfp4",
    "fp8/tensor",
    "fp8/channel",
)
Quantize = Callable[[np.ndarray, Precision], QuantizedRows]


class RoundedLlama:
    """The eager model, whose decoder layers' matrices can be rounded and restored."""

    def __init__(self, checkpoint: Path, ids: list[np.ndarray]) -> None:
        import torch
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.matrices = {n: p for n, p in self.model.named_parameters() if ".layers." in n and p.dim() == 2}
        self.original = {name: value.detach().numpy().copy() for name, value in self.matrices.items()}
        self.ids = [torch.from_numpy(row)[None] for row in ids]
        self.expected = list(self._log_probabilities())

    def _log_probabilities(self) -> Iterator[Any]:
        import torch

        for row in self.ids:
            with torch.inference_mode():
                yield torch.log_softmax(self.model(row).logits[0], -1)

    def divergence(self, quantize: Quantize, precision: Precision) -> float:
        """Mean KL(eager || rounded) of a token, in nats."""
        import torch

        for name, value in self.matrices.items():
            value.data.copy_(torch.from_numpy(quantize(self.original[name], precision).dequantize()))
        found = zip(self.expected, self._log_probabilities(), strict=True)
        return float(np.mean([float((a.exp() * (a - b)).sum(-1).mean()) for a, b in found]))


def squared_error(precision: Precision) -> float:
    """Of the searched scales, relative to that of plain ones: rows of 2048 Gaussian weights."""
    weights = np.random.default_rng(0).standard_normal((512, 2048)).astype(np.float32)
    errors = [
        float(((quantize(weights, precision).dequantize().astype(np.float64) - weights) ** 2).sum())
        for quantize in (quantize_rows, absmax_rows)
    ]
    return errors[0] / errors[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    options = parser.parse_args()
    llama = RoundedLlama(options.checkpoint, windows(options.checkpoint, options.window, options.windows))
    rows = []
    for precision in map(parse_precision, PRECISIONS):
        rows.append(
            {
                "precision": precision.describe(),
                "squared error": squared_error(precision),
                "KL plain": llama.divergence(absmax_rows, precision),
                "KL searched": llama.divergence(quantize_rows, precision),
            }
        )
    show(f"{options.checkpoint.name}, {options.windows} windows of {options.window}", rows)


if __name__ == "__main__":
    main()
