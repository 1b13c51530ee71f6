"""Prefill and decode speed of an OpenVINO GenAI model, as one JSON line. Its own process and environment.

python openvino_speed.py MODEL PROMPT_TOKENS NEW_TOKENS THREADS
"""

import json
import sys

import numpy as np
import openvino as ov
import openvino_genai as genai


def measure(pipeline: genai.LLMPipeline, prompt_tokens: int, new_tokens: int, seed: int) -> tuple[float, float]:
    """Tokens per second of the prompt up to the first new token, and of the tokens after it."""
    ids = np.random.default_rng(seed).integers(10, 1000, (1, prompt_tokens)).astype(np.int64)
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = new_tokens
    config.ignore_eos, config.do_sample = True, False
    metrics = pipeline.generate(ov.Tensor(ids), config).perf_metrics
    return prompt_tokens / (metrics.get_ttft().mean / 1e3), 1e3 / metrics.get_tpot().mean


def main() -> None:
    path, prompt_tokens, new_tokens, threads = sys.argv[1], *map(int, sys.argv[2:5])
    pipeline = genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
    measure(pipeline, min(prompt_tokens, 64), 4, 0)
    prefill, decode = measure(pipeline, prompt_tokens, new_tokens, 1)
    print(json.dumps({"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}))


if __name__ == "__main__":
    main()
