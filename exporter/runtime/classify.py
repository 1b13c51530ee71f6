"""Telling labels apart with a runner: one logit a label after a whole prompt, probabilities over the labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.core.errors import EngineSmithError
from exporter.core.task import Task
from exporter.runtime.generate import check_prompts, padded_prompts
from targets.base import Runner


@dataclass(frozen=True)
class Classification:
    """One prompt's label: the likeliest, of equal ones the first. `logits` and `probabilities` go by label, in the
    order of the build; the probabilities are softmax over the labels alone."""

    prompt_ids: tuple[int, ...]
    label: str
    token_id: int
    probabilities: dict[str, float]
    logits: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """What `run --json` prints on a classifier."""
        return {
            "prompt_ids": list(self.prompt_ids),
            "label": self.label,
            "token_id": self.token_id,
            "probabilities": dict(self.probabilities),
            "logits": dict(self.logits),
        }

    def describe(self) -> str:
        """The label, and how likely each is, for people."""
        width = max(map(len, self.probabilities))
        lines = (f"  {label:<{width}}  {probability:.4f}" for label, probability in self.probabilities.items())
        return "\n".join((self.label, *lines))


def classify_batch(
    runner: Runner, prompts: Sequence[Sequence[int]], task: Task, *, max_seq_len: int
) -> list[Classification]:
    """The label of each prompt, whatever their number and lengths: as many run together as the runner has rows.

    Prompts of like lengths are put together, so that little is padded; each is a prefill of its own. Raises
    InputError: `run.too_long`, `run.empty_prompt`; EngineSmithError (`run.not_finite`) where the engine is broken.
    """
    check_prompts(prompts, max_seq_len)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    rows, found = len(runner.lengths), dict[int, Classification]()
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        logits = runner.prefill(*padded_prompts([prompts[index] for index in chosen], rows))
        for index, row in zip(chosen, logits, strict=False):
            found[index] = _classification(prompts[index], row, task)
    return [found[index] for index in range(len(prompts))]


def _classification(prompt: Sequence[int], logits: np.ndarray, task: Task) -> Classification:
    """`logits` float32 [L]."""
    if not np.isfinite(logits).all():
        what = f"the engine produced the logits {logits.tolist()[:8]}"
        raise EngineSmithError("run.not_finite", what, "verify the engine: it is broken")
    best, wide = int(np.argmax(logits)), logits.astype(np.float64)
    weights = np.exp(wide - wide[best])
    probabilities = (weights / weights.sum()).tolist()
    return Classification(
        tuple(int(token) for token in prompt),
        task.labels[best],
        task.token_ids[best],
        dict(zip(task.labels, probabilities, strict=True)),
        dict(zip(task.labels, wide.tolist(), strict=True)),
    )
