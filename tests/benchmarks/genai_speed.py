"""Prefill and decode speed of an onnxruntime-genai model, as one JSON line. Its own process, so that nothing is shared.

python -m tests.benchmarks.genai_speed MODEL PROMPT_TOKENS NEW_TOKENS THREADS
"""

import json
import sys
import time

import numpy as np
import onnxruntime_genai as og


def measure(model: og.Model, prompt_tokens: int, new_tokens: int, seed: int) -> tuple[float, float]:
    """Tokens per second of the prompt up to the first new token, and of the tokens after it."""
    parameters = og.GeneratorParams(model)
    length = prompt_tokens + new_tokens
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    ids = np.random.default_rng(seed).integers(10, 1000, (1, prompt_tokens)).astype(np.int32)
    start = time.perf_counter()
    generator.append_tokens(ids)
    generator.generate_next_token()
    first = time.perf_counter()
    count = 0
    while count < new_tokens - 1 and not generator.is_done():
        generator.generate_next_token()
        count += 1
    end = time.perf_counter()
    return prompt_tokens / (first - start), count / (end - first)


def main() -> None:
    path, prompt_tokens, new_tokens, threads = sys.argv[1], *map(int, sys.argv[2:5])
    config = og.Config(path)
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(options))
    model = og.Model(config)
    measure(model, min(prompt_tokens, 16), 4, 0)
    prefill, decode = measure(model, prompt_tokens, new_tokens, 1)
    print(json.dumps({"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}))


if __name__ == "__main__":
    main()
