"""The shapes that kernels are chosen for: one profile for steps of one token, one for prompts."""

from collections.abc import Sequence

from exporter.core.engine_options import EngineOptions
from exporter.core.errors import InputError
from exporter.core.task import Task
from targets.base import Limits
from targets.tensorrt.engine_index import DECODE, PREFILL, StepProfile

BATCH, LENGTH = "B", "S"
USUAL_PROMPT, LONGEST_STEP = 256, 2048
Shape = tuple[int, ...]
Profile = StepProfile


def profiles(limits: Limits, options: EngineOptions, task: Task) -> tuple[Profile, ...]:
    """Decode (one token a row) and prefill (1 to `max_prompt` tokens a row; longer prompts come in several steps).

    Classifiers keep no cache, so their whole prompt is one step: prefill alone, as long as a row may be. Raises
    InputError where an option is out of range.
    """
    longest = limits.max_seq_len if task.classifies else min(LONGEST_STEP, limits.max_seq_len)
    most = _within("--max-prompt", options.max_prompt, longest, limits.max_seq_len, "--max-seq-len")
    usual = _within("--opt-prompt", options.opt_prompt, min(USUAL_PROMPT, most), most, "--max-prompt")
    rows = _within("--opt-batch", options.opt_batch, 1, limits.max_batch, "--max-batch")
    batch = (1, rows, limits.max_batch)
    prefill = Profile(PREFILL, batch, (1, usual, most))
    return (prefill,) if task.classifies else (Profile(DECODE, batch, (1, 1, 1)), prefill)


def shapes(profile: Profile, dimensions: Sequence[int | str]) -> list[Shape]:
    """The least, usual and greatest shape of an input whose axes are sizes, `B` (rows) or `S` (tokens of a row)."""
    axes = {BATCH: profile.batch, LENGTH: profile.sequence}
    return [tuple(size if isinstance(size, int) else axes[size][pick] for size in dimensions) for pick in range(3)]


def _within(flag: str, value: int | None, otherwise: int, most: int, bound: str) -> int:
    chosen = otherwise if value is None else value
    if not 1 <= chosen <= most:
        raise InputError("tensorrt.profile", f"{flag} is {chosen}, {bound} is {most}", f"give 1 to {most}")
    return chosen
