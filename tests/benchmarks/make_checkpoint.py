"""Write a random checkpoint of a named shape, tensor by tensor, whatever its size.

    python -m tests.benchmarks.make_checkpoint llama-3.2-1b DIR [--seed 0] [--shard-bytes 4000000000]

Matrices are bf16, normal with standard deviation 0.02 as at initialisation (rows differ in scale by up
to 2, so that quantization groups differ), norms are around 1. Peak memory is some chunks, never a model.
"""

import argparse
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from exporter.core.config import parse_config
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.tokenizer import write_tokenizer

POOL = 1 << 22  # bf16 values that rows are cut from, at random offsets
CHUNK = 1 << 23  # elements written at a time
SCALES = (0.7, 0.8, 0.9, 1.0, 1.0, 1.1, 1.2, 1.4)


class RandomTensors:
    """Rows cut from one pool of normal values: as fast as copying, and deterministic for a seed."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        values = self._random.standard_normal((len(SCALES), POOL // len(SCALES)), dtype=np.float32)
        scaled = values * (0.02 * np.array(SCALES, np.float32)[:, None])
        self._pool = scaled.astype(ml_dtypes.bfloat16).view(np.uint16).reshape(-1)

    def chunks(self, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """uint16 bit patterns of bf16, in chunks of whole rows; a vector [N] comes as one chunk around 1."""
        if len(shape) == 1:
            values = 1 + 0.1 * self._random.standard_normal(shape, dtype=np.float32)
            yield values.astype(ml_dtypes.bfloat16).view(np.uint16)
            return
        rows, width = shape
        windows = sliding_window_view(self._pool, width)
        step = max(1, CHUNK // width)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            yield windows[self._random.integers(0, len(windows), count)]


def plan_shards(shapes: dict[str, tuple[int, ...]], limit: int) -> list[dict[str, tuple[int, ...]]]:
    """Tensors in order, as many in a shard as `limit` bytes hold (at least one)."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    return shards


def write_shard(file: BinaryIO, shapes: dict[str, tuple[int, ...]], source: RandomTensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    for shape in shapes.values():
        for chunk in source.chunks(shape):
            file.write(np.ascontiguousarray(chunk).data)


def write_weights(out: Path, shapes: dict[str, tuple[int, ...]], seed: int, limit: int) -> None:
    shards, source = plan_shards(shapes, limit), RandomTensors(seed)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        with (out / name).open("wb") as file:
            write_shard(file, shard, source)
        weight_map.update(dict.fromkeys(shard, name))
    if len(shards) > 1:
        total = sum(2 * math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def make_checkpoint(
    shape: str, out: Path, seed: int = 0, shard_bytes: int = 4_000_000_000, layers: int | None = None
) -> Path:
    """Write config.json, generation_config.json, tokenizer and weights of a named shape into `out`; `layers` cuts its
    depth."""
    raw = {**SHAPES[shape], **({"num_hidden_layers": layers} if layers else {})}
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(raw, indent=1))
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}))
    write_tokenizer(out)
    write_weights(out, parse_config(raw).tensor_shapes, seed, shard_bytes)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=4_000_000_000)
    parser.add_argument("--layers", type=int, help="only the first so many layers")
    arguments = parser.parse_args()
    make_checkpoint(arguments.shape, arguments.out, arguments.seed, arguments.shard_bytes, arguments.layers)


if __name__ == "__main__":
    main()
