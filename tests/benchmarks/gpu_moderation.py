"""The moderation case on a GPU: a prompt of 300 tokens in, one label out.

    python -m tests.benchmarks.gpu_moderation --work DIR [--shape llama-2-7b] [--recipe fp8] [--batch 1,8]
        [--prompt-tokens 300] [--calls 100] [--layers N] [--stand-in] [--json FILE]

Makes a classifier of random weights, compiles it, and times whole calls, from token ids in memory to logits in memory.
Goal: under 8 ms for one prompt on an H200. `--stand-in` runs the graph on the CPU instead: to test this script.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from exporter.core.config import ModelConfig
from exporter.core.engine_options import EngineOptions
from exporter.core.task import Task
from targets.base import Limits, Runner
from tests.benchmarks.gpu_engine import MadeEngine, make_engine, timed, write_checkpoint
from tests.benchmarks.shapes import SHAPES

LABELS = Task("classify", ("safe", "unsafe"), (3, 5))
GOAL_SECONDS = 0.008
WARM_UP = 10
ROOM = 8
"""Prompts may be this much longer than those measured."""
H200_BYTES_PER_SECOND = 4.8e12
"""Of its memory, by NVIDIA's datasheet."""
H200_FP8_PER_SECOND = 1.979e15
"""Operations in FP8 without sparsity, by the same."""


def main() -> None:
    asked = arguments().parse_args()
    seconds: dict[str, float] = {}
    with timed(seconds, "checkpoint"):
        checkpoint = write_checkpoint(asked.work / "checkpoint", asked.shape, 0, asked.layers)
    engine = moderation_engine(asked, checkpoint)
    engine.seconds = seconds | engine.seconds
    rows = [measure(engine, batch, asked.prompt_tokens, asked.calls) for batch in asked.batch]
    report = {"facts": engine.facts, "rows": rows, "goal_seconds": GOAL_SECONDS}
    print(json.dumps(report, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(report) + "\n")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--recipe", default="fp8")
    parser.add_argument("--batch", type=batches, default=(1, 8))
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser


def batches(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def moderation_engine(asked: argparse.Namespace, checkpoint: Any) -> MadeEngine:
    """Kernels are chosen for one prompt of the measured length."""
    limits = Limits(max(asked.batch), asked.prompt_tokens + ROOM)
    options = EngineOptions(opt_batch=min(asked.batch), opt_prompt=asked.prompt_tokens)
    return make_engine(asked.work / "engine", checkpoint, asked.recipe, limits, LABELS, options, asked.stand_in)


def measure(engine: MadeEngine, batch: int, tokens: int, calls: int) -> dict[str, Any]:
    """Seconds of one call with `batch` prompts: median and 99th percentile, and the floors under it."""
    with engine.open(batch) as runner:
        times = call_times(runner, engine.config, batch, tokens, calls)
    floors = floor_seconds(engine.config, engine.weights_bytes, batch, tokens)
    return {
        "batch": batch,
        "prompt_tokens": tokens,
        "calls": calls,
        "median_seconds": float(np.median(times)),
        "p99_seconds": float(np.quantile(times, 0.99)),
        "h200_floor_seconds": floors,
    }


def call_times(runner: Runner, config: ModelConfig, batch: int, tokens: int, calls: int) -> np.ndarray:
    """Seconds [calls], other ids each time."""
    random = np.random.default_rng(0)
    lengths, times = np.full(batch, tokens), []
    for number in range(WARM_UP + calls):
        ids = random.integers(0, config.vocab_size, (batch, tokens))
        start = time.perf_counter()
        logits = runner.prefill(ids, lengths)
        if number >= WARM_UP:
            times.append(time.perf_counter() - start)
    assert np.isfinite(logits).all(), "the engine's logits are not finite"
    return np.array(times)


def floor_seconds(config: ModelConfig, weights_bytes: int, batch: int, tokens: int) -> dict[str, float]:
    """What an H200 cannot go below: reading every weight once, and the products of the layers' matrices in FP8."""
    weights = sum(rows * width for rows, width in config.linear_shapes.values()) * config.num_layers
    return {
        "memory": weights_bytes / H200_BYTES_PER_SECOND,
        "arithmetic": 2.0 * weights * batch * tokens / H200_FP8_PER_SECOND,
    }


if __name__ == "__main__":
    main()
