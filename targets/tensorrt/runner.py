"""Running an engine: rows become steps that an executor computes."""

import numpy as np

from exporter.core.config import ModelConfig
from exporter.core.errors import ArtifactError, InputError, UnsupportedError
from targets.base import Limits, RunOptions
from targets.cached_rows import CachedRows
from targets.tensorrt.engine_index import PREFILL, EngineIndex
from targets.tensorrt.executor import Executor, StepResult
from targets.tensorrt.file_names import INDEX
from targets.tensorrt.step_plan import Step, plan_steps, plan_whole


class TensorRtRunner(CachedRows):
    """targets.base.Runner over any executor, which it closes."""

    def __init__(
        self, executor: Executor, index: EngineIndex, config: ModelConfig, limits: Limits, options: RunOptions
    ) -> None:
        super().__init__(config.vocab_size, limits, options)
        self._index = index
        self._keep_hidden = options.hidden_states
        self._executor: Executor | None = executor

    def close(self) -> None:
        """Free what the engine holds; the runner cannot be used afterwards."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.close()

    def _append(self, ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
        if self._executor is None:
            raise InputError("run.closed", "the engine is closed", "open it again")
        logits = np.zeros((self._batch, self._index.outputs), np.float32)
        count = self._index.num_layers + 1 if self._keep_hidden else 0
        self.hidden = [np.zeros((*ids.shape, self._index.hidden_size), np.float32) for _ in range(count)]
        if self._index.has_cache:
            for step in plan_steps(ids, valid, self.lengths, self._index.cache_length, self._index.longest_step):
                self._take(step, self._executor.step(step, step.profile), logits)
                self.lengths += step.valid
        elif valid.any():
            self._classify(self._executor, ids, valid, logits)
        return logits

    def _classify(self, executor: Executor, ids: np.ndarray, valid: np.ndarray, logits: np.ndarray) -> None:
        """Without a cache a prompt is taken whole, and nothing is kept of it but how long it was."""
        if self.lengths.any():
            raise UnsupportedError(
                "run.classify",
                "this engine keeps no cache: it cannot continue a prompt",
                "give the whole prompt at once",
            )
        step = plan_whole(ids, valid)
        if step.width > self._index.longest_step:
            raise InputError(
                "run.too_long",
                f"a prompt of {step.width} tokens, the engine takes {self._index.longest_step} at once",
                "shorten the prompt, or build with a larger --max-prompt",
            )
        self._take(step, executor.step(step, PREFILL), logits)
        self.lengths += step.valid

    def _take(self, step: Step, result: StepResult, logits: np.ndarray) -> None:
        """Logits [B, V] of rows that ended, and the hidden states of valid positions, to where they belong."""
        if result.logits is not None:
            logits[step.ended] = result.logits[step.ended]
        inside = np.arange(step.width) < step.valid[:, None]
        for whole, part in zip(self.hidden, result.hidden, strict=self._keep_hidden):
            whole[:, step.column : step.column + step.width][inside] = part[inside]


def check_index(index: EngineIndex, config: ModelConfig, limits: Limits) -> None:
    """Raise ArtifactError unless engine.json and the artifact's configuration speak of one model."""
    for name in ("hidden_size", "num_layers", "num_kv_heads", "head_dim", "vocab_size"):
        if getattr(index, name) != getattr(config, name):
            raise _differs(f"{name} {getattr(index, name)}", f"the model's configuration {getattr(config, name)}")
    if index.has_cache and index.cache_length <= limits.max_seq_len:
        raise _differs(f"a cache of {index.cache_length} positions", f"the engine's limit {limits.max_seq_len}")
    most = min(profile.batch[2] for profile in index.profiles)
    if most < limits.max_batch:
        raise _differs(f"up to {most} rows", f"the engine's limit {limits.max_batch}")


def _differs(one: str, other: str) -> ArtifactError:
    return ArtifactError(
        "tensorrt.index", f"{INDEX} says {one}, {other}", "the files are of different engines: build it again"
    )
