"""Speed and memory of an engine: the `bench` object of the contract. docs/runtime.md tells how each is measured."""

import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from calibration.coverage import coverage
from exporter.artifact.load import Artifact
from exporter.artifact.manifest import Manifest
from exporter.core.errors import InputError
from exporter.core.recipe import kv_cache_bytes
from exporter.runtime.engine import Engine, load, load_opened
from exporter.runtime.memory_bandwidth import measure_bandwidth
from targets.registry import get_target

REPETITIONS = 3
NEW_TOKENS = 64
CLASSIFICATIONS, LEAST_CLASSIFICATIONS, CLASSIFYING_SECONDS = 100, 10, 10.0
"""A classifier is called so often, but not beyond so many seconds once it was called the least number of times."""
SEED = 0
EMBEDDING = "model.embed_tokens.weight"


def bench(
    engine_path: str | PathLike[str] | Artifact,
    prompt_tokens: int = 128,
    new_tokens: int | None = None,
    batch: int = 1,
    context: int = 0,
    threads: int = 0,
) -> dict[str, Any]:
    """Measure an engine; each speed is the median of several repetitions over all rows of the batch. An artifact that
    was opened before is not checked again, which `load_seconds` then shows.

    Decoding, of `new_tokens` (default 64), follows a prefix of `context` tokens (0: the prompt). A classifier decodes
    nothing: those figures are None, and `classify_latency_seconds` tells how long a call takes. Run it in a fresh
    process: `peak_rss_bytes` is that of the process from loading on. Raises what `load` raises, and InputError
    when the tokens do not fit the engine's limit.
    """
    reset_peak()
    start = time.perf_counter()
    loader = load_opened if isinstance(engine_path, Artifact) else load
    with loader(engine_path, threads=threads, batch=batch) as engine:  # type: ignore[arg-type]
        load_seconds = time.perf_counter() - start
        speeds = _Speeds.measure(engine, batch, prompt_tokens, new_tokens, context)
        peak = peak_rss_bytes()
        manifest, threads = engine.manifest, engine.threads
    bandwidth = measure_bandwidth(threads)
    return {
        "prefill_tokens_per_s": batch * prompt_tokens / speeds.prefill,
        "decode_tokens_per_s": None if speeds.decode is None else batch / speeds.decode,
        "load_seconds": load_seconds,
        "weights_bytes": manifest.weights_bytes,
        "peak_rss_bytes": peak,
        "threads": threads,
        "memory_bandwidth_bytes_per_s": bandwidth,
        "decode_bandwidth_fraction": None if speeds.decode is None else speeds.bytes_read / speeds.decode / bandwidth,
        "batch": batch,
        "context": context,
        **({} if speeds.latency is None else {"classify_latency_seconds": speeds.latency}),
    }


def bench_to_fit(artifact: Artifact, threads: int = 0) -> dict[str, Any]:
    """`bench` with its usual prompt and answer, or shorter ones where the engine is built for fewer positions."""
    limits = artifact.manifest.limits
    prompt, new = min(128, limits.max_seq_len // 2), max(1, min(NEW_TOKENS, limits.max_seq_len // 4))
    answer = None if artifact.manifest.task.classifies else new
    return bench(artifact, prompt_tokens=prompt, new_tokens=answer, threads=threads)


@dataclass(frozen=True)
class _Speeds:
    """Seconds of a prefill; of a decoding step, and the bytes it reads; of a classification, `median` and `p99`."""

    prefill: float
    decode: float | None = None
    bytes_read: float = 0.0
    latency: dict[str, float] | None = None

    @staticmethod
    def measure(engine: Engine, batch: int, prompt_tokens: int, new_tokens: int | None, context: int) -> "_Speeds":
        manifest = engine.manifest
        if manifest.task.classifies:
            _refuse_decoding(new_tokens, context)
            _check_lengths(manifest, prompt_tokens, 0, 0)
            latency = _time_classify(engine, _tokens(manifest, batch, prompt_tokens))
            return _Speeds(latency["median"], latency=latency)
        steps = NEW_TOKENS if new_tokens is None else new_tokens
        _check_lengths(manifest, prompt_tokens, steps, context)
        prompt = _tokens(manifest, batch, prompt_tokens)
        prefill = _time_prefill(engine, prompt)
        prefix = _tokens(manifest, batch, context) if context else prompt
        positions = prefix.shape[1] + steps / 2
        return _Speeds(prefill, _time_decode(engine, prefix, steps), bytes_per_step(manifest, batch, positions))


def _refuse_decoding(new_tokens: int | None, context: int) -> None:
    given = {"--new-tokens": new_tokens is not None, "--context": context != 0}
    if names := [name for name, here in given.items() if here]:
        raise InputError("run.task", f"a classifier decodes nothing: {', '.join(names)}", f"leave {names[0]} out")


def bytes_per_step(manifest: Manifest, batch: int, positions: float) -> float:
    """Bytes that one decoding step must read: every weight but the embedding, of which it needs one row, and
    the cached keys and values of `positions` positions in each row."""
    config = manifest.config
    matrices = coverage(config, manifest.recipe).tensors
    matrix_bits = get_target(manifest.target).matrix_bits
    read = [tensor for tensor in matrices if tensor.name != EMBEDDING]
    bits = sum(tensor.stored_bits(matrix_bits) for tensor in read)
    vectors = sum(shape[0] for shape in config.tensor_shapes.values() if len(shape) == 1)
    heads = 2 * config.num_layers * config.num_kv_heads
    cache = heads * kv_cache_bytes(manifest.recipe.kv_cache, config.head_dim) * positions
    return bits / 8 + 4 * vectors + batch * cache


def _check_lengths(manifest: Manifest, prompt_tokens: int, new_tokens: int, context: int) -> None:
    for name, value, low in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 0 if manifest.task.classifies else 1),
        ("context", context, 0),
    ):
        if value < low:
            raise InputError(f"usage.{name}", f"{name} is {value}", f"give at least {low}")
    limit = manifest.limits.max_seq_len
    needed = max(prompt_tokens, (context or prompt_tokens) + new_tokens)
    if needed > limit:
        raise InputError(
            "run.too_long",
            f"the measurement needs {needed} positions, the engine holds {limit}",
            "measure fewer tokens, or build with a larger --max-seq-len",
        )


def _tokens(manifest: Manifest, batch: int, length: int) -> np.ndarray:
    """Seeded token ids from the whole vocabulary, int64 [B, S]: not one id over and over, which caches would favour."""
    random = np.random.default_rng([SEED, length])
    return random.integers(0, manifest.source.config.vocab_size, (batch, length), np.int64)


def _time_prefill(engine: Engine, ids: np.ndarray) -> float:
    """Median seconds of a prefill of ids [B, S], after one to warm up."""
    lengths = np.full(len(ids), ids.shape[1], np.int64)
    seconds = []
    for _ in range(REPETITIONS + 1):
        engine.runner.reset()
        start = time.perf_counter()
        engine.runner.prefill(ids, lengths)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def _time_classify(engine: Engine, ids: np.ndarray) -> dict[str, float]:
    """Median and 99th percentile of the seconds from ids [B, S] to labels, after one call to warm up."""
    prompts = ids.tolist()
    engine.classify(prompts)
    seconds: list[float] = []
    while len(seconds) < CLASSIFICATIONS:
        start = time.perf_counter()
        engine.classify(prompts)
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= LEAST_CLASSIFICATIONS and sum(seconds) > CLASSIFYING_SECONDS:
            break
    return {"median": median(seconds), "p99": float(np.quantile(seconds, 0.99))}


def _time_decode(engine: Engine, prefix: np.ndarray, steps: int) -> float:
    """Median over repetitions of the mean seconds of a greedy decoding step after prefix [B, S]."""
    batch, length = prefix.shape
    active = np.ones(batch, bool)
    engine.runner.reset()
    first = engine.runner.prefill(prefix, np.full(batch, length, np.int64)).argmax(axis=-1)
    seconds = []
    for _ in range(REPETITIONS):
        tokens = first
        start = time.perf_counter()
        for _ in range(steps):
            tokens = engine.runner.decode(tokens, active).argmax(axis=-1)
        seconds.append((time.perf_counter() - start) / steps)
        for row in range(batch):
            engine.runner.truncate(row, length)
    return median(seconds)


def reset_peak() -> None:
    """Make the kernel forget this process's peak so far, where it can (proc(5), clear_refs)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, file pages included."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
