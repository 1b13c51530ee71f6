"""Decode and prefill of our int4 engine against onnxruntime-genai running its own builder's model.

    python -m tests.benchmarks.speed CHECKPOINT --work DIR [--prompt-tokens 128,512] [--new-tokens 64] [--repeat 5]
                                     [--threads 2]

Builds both into DIR where they are not there yet. Every round starts each program once, in alternating
order; the ratio is that of the medians (and the lowest and highest ratio within one round are shown).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.commands import build_genai, build_ours, built, run_json
from tests.benchmarks.report import show, spread

FIGURES = {"prefill": "prefill_tokens_per_s", "decode": "decode_tokens_per_s"}


def commands(ours: Path, peer: Path, prompt: int, new: int, threads: int) -> dict[str, list[str]]:
    bench = [sys.executable, "-m", "exporter", "bench", str(ours), "--json", "--prompt-tokens", str(prompt)]
    genai = [sys.executable, "-m", "tests.benchmarks.genai_speed", str(peer), str(prompt), str(new), str(threads)]
    return {
        "enginesmith": [*bench, "--new-tokens", str(new), "--threads", str(threads)],
        "onnxruntime-genai": genai,
    }


def alternate(programs: dict[str, list[str]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run every program once a round; the order turns round each time."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for number in range(rounds):
        for name in list(programs)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(run_json(programs[name]))
    return found


def compare(found: dict[str, list[dict[str, Any]]], prompt: int) -> list[dict[str, Any]]:
    rows = []
    for figure, key in FIGURES.items():
        ours = [run[key] for run in found["enginesmith"]]
        peer = [run[key] for run in found["onnxruntime-genai"]]
        ratios = spread([a / b for a, b in zip(ours, peer, strict=True)])
        medians = spread(ours)["median"], spread(peer)["median"]
        rows.append(
            {
                "figure": f"{figure}, prompt {prompt}",
                "enginesmith tok/s": medians[0],
                "genai tok/s": medians[1],
                "ratio": medians[0] / medians[1],
                "lowest": ratios["lowest"],
                "highest": ratios["highest"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompt-tokens", default="128,512")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    outs = arguments.work / "enginesmith-int4", arguments.work / "genai-int4"
    ours = built(build_ours(arguments.checkpoint, outs[0]), outs[0])
    peer = built(build_genai(arguments.checkpoint, outs[1]), outs[1])
    rows, runs = [], {}
    for prompt in map(int, arguments.prompt_tokens.split(",")):
        programs = commands(ours, peer, prompt, arguments.new_tokens, arguments.threads)
        runs[prompt] = alternate(programs, arguments.repeat)
        rows += compare(runs[prompt], prompt)
    show(f"Speed, int4, {arguments.threads} threads: {arguments.checkpoint.name}", rows, runs=runs)


if __name__ == "__main__":
    main()
