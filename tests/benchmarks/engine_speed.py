"""Prefill and decode speed of one of our engines, as one JSON line, measured as the peers' are. Its own process.

python -m tests.benchmarks.engine_speed ENGINE PROMPT_TOKENS NEW_TOKENS THREADS [BATCH]
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from exporter.runtime.bench import peak_rss_bytes
from exporter.runtime.engine import Engine, load


def measure(engine: Engine, prompt_tokens: int, new_tokens: int, batch: int, seed: int) -> tuple[float, float]:
    """Tokens per second of the prompts up to the first new tokens, and of the tokens after them, over all rows."""
    ids = np.random.default_rng(seed).integers(10, 1000, (batch, prompt_tokens)).astype(np.int64)
    active = np.ones(batch, bool)
    engine.runner.reset()
    start = time.perf_counter()
    tokens = engine.runner.prefill(ids, np.full(batch, prompt_tokens)).argmax(axis=-1)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        tokens = engine.runner.decode(tokens, active).argmax(axis=-1)
    end = time.perf_counter()
    return batch * prompt_tokens / (first - start), batch * (new_tokens - 1) / (end - first)


def main() -> None:
    path, prompt_tokens, new_tokens, threads, *rest = sys.argv[1], *map(int, sys.argv[2:])
    batch = rest[0] if rest else 1
    start = time.perf_counter()
    with load(Path(path), threads=threads, batch=batch) as engine:
        loaded = time.perf_counter()
        measure(engine, 1, 1, batch, 0)
        first_token = time.perf_counter()
        measure(engine, min(prompt_tokens, 64), 4, batch, 0)
        prefill, decode = measure(engine, prompt_tokens, new_tokens, batch, 1)
        weights = engine.manifest.weights_bytes
    found = {
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "load_seconds": loaded - start,
        "first_token_seconds": first_token - start,
        "weights_bytes": weights,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
