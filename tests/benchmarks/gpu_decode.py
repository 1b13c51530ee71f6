"""Decoding on a GPU: our engine beside torch, eager and compiled, in the same run.

    python -m tests.benchmarks.gpu_decode --work DIR [--shape llama-3.1-8b] [--recipe fp8] [--context 512]
        [--new-tokens 128] [--layers N] [--stand-in] [--without torch-compile] [--json FILE]

One row, greedy, each step one token after `context` cached ones. torch runs transformers' own model of the shape in
bfloat16 with random weights: eagerly with its usual cache, and compiled (`mode="reduce-overhead"`, which replays CUDA
graphs) with a static cache. Goal: at least twice as fast as either. `--stand-in` runs the graph on the CPU, and torch
in float32: to test this script.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from exporter.core.engine_options import EngineOptions
from targets.base import Limits
from tests.benchmarks.gpu_engine import MadeEngine, make_engine, timed, write_checkpoint
from tests.benchmarks.shapes import SHAPES

PEERS = ("torch-eager", "torch-compile")
GOAL_RATIO = 2.0
WARM_UP = 8
Step = Callable[[int, int], int]
"""(token id, position) -> the next token id, which is on the host then."""


def main() -> None:
    asked = arguments().parse_args()
    positions = asked.context + asked.new_tokens + WARM_UP
    seconds: dict[str, float] = {}
    with timed(seconds, "checkpoint"):
        checkpoint = write_checkpoint(asked.work / "checkpoint", asked.shape, 0, asked.layers)
    options = EngineOptions(opt_prompt=min(asked.context, 256), max_prompt=min(asked.context, 512))
    limits = Limits(1, positions)
    engine = make_engine(
        asked.work / "engine", checkpoint, asked.recipe, limits, options=options, stand_in=asked.stand_in
    )
    engine.seconds = seconds | engine.seconds
    speeds = {"enginesmith": engine_speed(engine, asked.context, asked.new_tokens)}
    for name in [peer for peer in PEERS if peer not in asked.without]:
        speeds[name] = torch_speed(name, checkpoint.config.raw, asked, positions)
    report = {"facts": engine.facts, "tokens_per_second": speeds, "ratios": ratios(speeds), "goal_ratio": GOAL_RATIO}
    print(json.dumps(report, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(report) + "\n")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--recipe", default="fp8")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--without", nargs="*", choices=PEERS, default=[])
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser


def ratios(speeds: dict[str, float]) -> dict[str, float]:
    """Our speed over each of the others'."""
    return {name: speeds["enginesmith"] / speed for name, speed in speeds.items() if name != "enginesmith"}


def engine_speed(engine: MadeEngine, context: int, new_tokens: int) -> float:
    """Tokens a second, each chosen on the host from the logits that came back."""
    prompt = np.random.default_rng(0).integers(0, engine.config.vocab_size, (1, context))
    with engine.open(1) as runner:
        runner.prefill(prompt, np.array([context]))

        def step(token: int, position: int) -> int:
            return int(runner.decode(np.array([token]), np.array([True]))[0].argmax())

        return steps_per_second(step, context, new_tokens)


def steps_per_second(step: Step, context: int, new_tokens: int) -> float:
    """From the median time of a step, after some that are not counted."""
    token, times = 1, []
    for number in range(WARM_UP + new_tokens):
        start = time.perf_counter()
        token = step(token, context + number)
        if number >= WARM_UP:
            times.append(time.perf_counter() - start)
    return 1.0 / float(np.median(times))


def torch_speed(name: str, raw: dict[str, Any], asked: argparse.Namespace, positions: int) -> float:
    """transformers' model of the same shape, one step at a time."""
    import torch
    from transformers import DynamicCache, StaticCache

    model = torch_model(raw, stand_in=asked.stand_in)
    config, device, compiled = model.config, model.device, name == "torch-compile"
    cache = StaticCache(config=config, max_cache_len=positions) if compiled else DynamicCache()
    forward = torch.compile(model.forward, mode="reduce-overhead") if compiled else model.forward
    prompt = torch.randint(0, config.vocab_size, (1, asked.context), device=device)

    def step(token: int, position: int) -> int:
        at = torch.tensor([[position]], device=device)
        ids = torch.tensor([[token]], device=device)
        return int(forward(input_ids=ids, position_ids=at, past_key_values=cache).logits[0, -1].argmax())

    with torch.inference_mode():
        at = torch.arange(asked.context, device=device)[None]
        model(input_ids=prompt, position_ids=at, past_key_values=cache, logits_to_keep=1)
        return steps_per_second(step, asked.context, asked.new_tokens)


def torch_model(raw: dict[str, Any], stand_in: bool) -> Any:
    """Random weights, made where they are used."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict(dict(raw))
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if stand_in else torch.bfloat16)
    try:
        with torch.device("cpu" if stand_in else "cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    main()
