"""How an engine is laid out, where its target leaves a choice."""

from dataclasses import dataclass
from pathlib import Path

from exporter.core.errors import InputError

MOST_RANKS = 1024
MOST_TOKENS = 1 << 26


@dataclass(frozen=True)
class EngineOptions:
    """Choices that some targets offer. Nothing is asked for by default.

    `tensor_parallel`, `pipeline_parallel`: into how many shards a checkpoint is cut; `format`: which form of checkpoint
    is written; `compile_engine`: run the vendor's compiler on it too. `opt_batch`, `opt_prompt`: rows and tokens of a
    step that kernels are chosen for; `max_prompt`: the most tokens of a step. `timing_cache`: a file of measured
    kernels to use and to extend; `version_compatible`, `hardware_compatible`: engines that other versions of the
    runtime, or newer GPUs, load too.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    format: str | None = None
    compile_engine: bool = False
    opt_batch: int | None = None
    opt_prompt: int | None = None
    max_prompt: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        for flag, value in (("--tp", self.tensor_parallel), ("--pp", self.pipeline_parallel)):
            _check_range(flag, value, MOST_RANKS)
        tokens = (("--opt-batch", self.opt_batch), ("--opt-prompt", self.opt_prompt), ("--max-prompt", self.max_prompt))
        for flag, count in tokens:
            if count is not None:
                _check_range(flag, count, MOST_TOKENS)

    @property
    def given(self) -> list[str]:
        """The command line's options that were given."""
        values = (
            ("--tp", self.tensor_parallel != 1),
            ("--pp", self.pipeline_parallel != 1),
            ("--format", self.format),
            ("--engine", self.compile_engine),
            ("--opt-batch", self.opt_batch),
            ("--opt-prompt", self.opt_prompt),
            ("--max-prompt", self.max_prompt),
            ("--timing-cache", self.timing_cache),
            ("--version-compatible", self.version_compatible),
            ("--hardware-compatible", self.hardware_compatible),
        )
        return [flag for flag, value in values if value]


def _check_range(flag: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise InputError("usage.engine", f"{flag} is {value}", f"give 1 to {most}")


PLAIN = EngineOptions()
