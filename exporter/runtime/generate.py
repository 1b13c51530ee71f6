"""Generating tokens with a runner: one prompt or a ragged batch, stopping row by row."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from exporter.core.errors import InputError
from exporter.runtime.sampling import Sampler, Sampling
from targets.base import Runner

OnToken = Callable[[int, int], None]


@dataclass(frozen=True)
class Generation:
    """One row's result. `output_ids` ends with the end-of-sequence token when `finish_reason` is `stop`;
    `length` means that `max_new_tokens` or the engine's limit was reached."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    finish_reason: str


def generate(
    runner: Runner,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    eos_token_ids: Iterable[int] = (),
    sampling: Sampling | None = None,
    on_token: OnToken | None = None,
    *,
    max_seq_len: int,
) -> Generation:
    """Continue one prompt; see `generate_batch`."""
    return generate_batch(
        runner, [prompt_ids], max_new_tokens, eos_token_ids, sampling, on_token, max_seq_len=max_seq_len
    )[0]


def generate_batch(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_ids: Iterable[int] = (),
    sampling: Sampling | None = None,
    on_token: OnToken | None = None,
    *,
    max_seq_len: int,
) -> list[Generation]:
    """Continue prompts of any lengths together, at most one per row of the runner's cache.

    A row ends at a token of `eos_token_ids`, after `max_new_tokens`, or when prompt and answer fill
    `max_seq_len` positions; the others go on. `on_token(row, token)` is called as tokens are chosen.
    Raises InputError: `run.too_long`, `run.empty_prompt`, `run.batch`, `usage.max_new_tokens`.
    """
    _check(runner, prompts, max_new_tokens, max_seq_len)
    rows = _Rows(prompts, max_new_tokens, frozenset(eos_token_ids), sampling or Sampling(), on_token, max_seq_len)
    if not any(rows.active):
        return rows.results()
    logits = runner.prefill(*padded_prompts(prompts, len(runner.lengths)))
    rows.choose(logits)
    while any(rows.active):
        logits = runner.decode(*rows.step(len(runner.lengths)))
        rows.choose(logits)
    return rows.results()


class _Rows:
    """Where every row of a batch stands."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_token_ids: frozenset[int],
        sampling: Sampling,
        on_token: OnToken | None,
        max_seq_len: int,
    ) -> None:
        self.prompts = [tuple(int(token) for token in prompt) for prompt in prompts]
        self.outputs: list[list[int]] = [[] for _ in prompts]
        self.room = [min(max_new_tokens, max_seq_len - len(prompt)) for prompt in prompts]
        self.reasons = ["length"] * len(prompts)
        self.active = [room > 0 for room in self.room]
        self.eos_token_ids, self.on_token = eos_token_ids, on_token
        self.samplers = [Sampler(sampling, row) for row in range(len(prompts))]

    def choose(self, logits: np.ndarray) -> None:
        """Take one token for each active row from logits [B, V]."""
        for row, sampler in enumerate(self.samplers):
            if not self.active[row]:
                continue
            token = sampler.choose(logits[row])
            self.outputs[row].append(token)
            if self.on_token is not None:
                self.on_token(row, token)
            if token in self.eos_token_ids:
                self.reasons[row] = "stop"
            self.active[row] = self.reasons[row] != "stop" and len(self.outputs[row]) < self.room[row]

    def step(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Last token of each row, int64 [B], and which rows go on, bool [B]; further rows of the cache rest."""
        last = np.zeros(rows, np.int64)
        active = np.zeros(rows, bool)
        for row, output in enumerate(self.outputs):
            last[row], active[row] = (output[-1] if output else self.prompts[row][-1]), self.active[row]
        return last, active

    def results(self) -> list[Generation]:
        return [
            Generation(prompt, tuple(output), reason)
            for prompt, output, reason in zip(self.prompts, self.outputs, self.reasons, strict=True)
        ]


def padded_prompts(prompts: Sequence[Sequence[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """ids int64 [B, S] right-padded and lengths [B]; rows without a prompt get one token that nobody reads."""
    lengths = np.ones(rows, np.int64)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    ids = np.full((rows, int(lengths.max())), prompts[0][0], np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return ids, lengths


def _check(runner: Runner, prompts: Sequence[Sequence[int]], max_new_tokens: int, max_seq_len: int) -> None:
    if max_new_tokens < 0:
        raise InputError("usage.max_new_tokens", f"max_new_tokens is {max_new_tokens}", "give 0 or more")
    if not 0 < len(prompts) <= len(runner.lengths):
        raise InputError(
            "run.batch",
            f"{len(prompts)} prompts for {len(runner.lengths)} rows",
            "load the engine with batch= the number of prompts",
        )
    check_prompts(prompts, max_seq_len)


def check_prompts(prompts: Sequence[Sequence[int]], max_seq_len: int) -> None:
    """Raise InputError for a prompt without a token (`run.empty_prompt`) or with too many (`run.too_long`)."""
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError("run.empty_prompt", f"prompt {row} has no tokens", "give at least one token")
        if len(prompt) > max_seq_len:
            raise InputError(
                "run.too_long",
                f"prompt {row} has {len(prompt)} tokens, the engine holds {max_seq_len} positions",
                "shorten the prompt, or build with a larger --max-seq-len",
            )
