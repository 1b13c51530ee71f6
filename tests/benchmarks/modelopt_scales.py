"""FP8 scales of ours beside modelopt's, from the same sequences: weights, inputs of matrices, keys and values.

    python -m tests.benchmarks.modelopt_scales CHECKPOINT TOKENS.npz AMAX.json --work DIR

AMAX.json is what calibration_peers.py writes for `modelopt FP8 + KV` on the same TOKENS.npz. Goals: weights to 1e-6,
activations to 1e-4 (sums are taken in another order). modelopt's scale of a tensor is amax / 448.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from calibration.qparams import QParams
from calibration.transformed import with_transforms
from calibration.weight_rows import WeightRows
from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.recipe import TENSOR, Precision, Recipe
from exporter.core.weights import QuantizedRows
from tests.benchmarks.calibration_ours import parameters_of
from tests.benchmarks.report import show

E4M3_TOP = 448.0
_FP32, _FP8 = Precision("fp32"), Precision("fp8", TENSOR, activations="fp8/tensor")
RECIPE = Recipe("fp8", _FP8, _FP32, _FP32, kv_cache="fp8")
GOALS = {"weights": 1e-6, "inputs": 1e-4, "keys and values": 1e-4}


def our_scales(checkpoint: Checkpoint, parameters: QParams) -> Iterator[tuple[str, str, float]]:
    """(what it is a scale of, modelopt's name for its quantizer, our scale)."""
    rows = WeightRows(with_transforms(checkpoint, parameters.transforms), stored=parameters)
    for layer in range(checkpoint.config.num_layers):
        prefix = f"model.layers.{layer}"
        for name, (height, _) in checkpoint.config.linear_shapes.items():
            module = f"{prefix}.{name}"
            codes = rows(CheckpointWeight((f"{module}.weight",), _FP8), 0, height)
            assert isinstance(codes, QuantizedRows) and len(np.unique(codes.scales)) == 1
            yield "weights", f"{module}.weight_quantizer", float(codes.scales[0, 0])
            yield "inputs", f"{module}.input_quantizer", parameters.input_scale(module, "fp8/tensor")
        for part, scale in zip("kv", parameters.kv_scales(layer, "fp8"), strict=True):
            yield "keys and values", f"{prefix}.self_attn.{part}_bmm_quantizer", scale


def differences(ours: Iterator[tuple[str, str, float]], amax: dict[str, list[float]]) -> dict[str, list[float]]:
    """|ours / theirs - 1| of every scale, by what it is a scale of."""
    found: dict[str, list[float]] = {kind: [] for kind in GOALS}
    for kind, name, scale in ours:
        (largest,) = amax[name]
        found[kind].append(abs(scale / (largest / E4M3_TOP) - 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("amax", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.checkpoint)
    ids = np.load(arguments.tokens)["calibration"]
    parameters, _ = parameters_of(checkpoint, RECIPE, ids, arguments.work)
    assert parameters is not None
    found = differences(our_scales(checkpoint, parameters), json.loads(arguments.amax.read_text()))
    table = [
        {
            "scales of": kind,
            "count": len(values),
            "largest difference": max(values),
            "median": float(np.median(values)),
            "goal": GOALS[kind],
        }
        for kind, values in found.items()
    ]
    show(f"FP8 scales against modelopt's, {len(ids)} sequences of {ids.shape[1]}", table)


if __name__ == "__main__":
    main()
