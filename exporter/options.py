"""What a build is asked to do, as one frozen value shared by the command line and the Python API."""

from dataclasses import dataclass
from pathlib import Path

from exporter.calibration_request import NO_CALIBRATION, CalibrationRequest
from exporter.core.config import ModelConfig
from exporter.core.device import THIS_MACHINE, DeviceOptions
from exporter.core.engine_options import PLAIN, EngineOptions
from exporter.core.errors import InputError
from exporter.core.task import CLASSIFY_KIND, GENERATE_KIND, TASKS
from exporter.core.threads import check_threads

DEFAULT_MAX_SEQ_LEN = 4096
# What a manifest can hold.
MAX_SEQ_LEN, MAX_BATCH = 1 << 26, 1 << 16
TRACERS = ("torch-export", "torchscript")
SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class BuildOptions:
    """Options of `enginesmith build`; None means the default that the documentation states.

    `recipe` is a preset's name or a TOML file, by default `fp32`, or that of the quantization parameters;
    `group_size`, `lm_head`, `embedding` and `kv_cache` override parts of it. `max_ram` is in bytes, `min_coverage` a
    fraction of the quantizable weights. `device` is the machine the engine is for, `engine` how it is laid out.
    `task` is `generate`, or `classify` between `labels`.
    """

    checkpoint: Path
    out: Path
    target: str
    recipe: str | None = None
    force: bool = False
    tracer: str = "torch-export"
    max_seq_len: int | None = None
    max_batch: int = 4
    group_size: int | None = None
    lm_head: str | None = None
    embedding: str | None = None
    kv_cache: str | None = None
    min_coverage: float = 1.0
    threads: int = 0
    max_ram: int | None = None
    parity: bool = True
    text: Path | None = None
    device: DeviceOptions = THIS_MACHINE
    calibration: CalibrationRequest = NO_CALIBRATION
    engine: EngineOptions = PLAIN
    task: str = GENERATE_KIND
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tracer not in TRACERS:
            raise InputError("usage.tracer", f"unknown tracer {self.tracer!r}", f"use one of {', '.join(TRACERS)}")
        for name, low, high in (("max_seq_len", 2, MAX_SEQ_LEN), ("max_batch", 1, MAX_BATCH)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"usage.{name}", f"--{name.replace('_', '-')} is {value}", f"give {low} to {high}")
        check_threads(self.threads)
        self._check_task()
        if not 0.0 <= self.min_coverage <= 1.0:
            raise InputError("usage.min_coverage", f"--min-coverage is {self.min_coverage}", "give a value from 0 to 1")

    def _check_task(self) -> None:
        if self.task not in TASKS:
            raise InputError("usage.task", f"unknown task {self.task!r}", f"use one of {', '.join(TASKS)}")
        if bool(self.labels) != (self.task == CLASSIFY_KIND):
            what = f"--task {self.task} {'with' if self.labels else 'without'} --labels"
            raise InputError("usage.labels", what, "give --task classify --labels safe,unsafe, or neither")

    def sequence_limit(self, config: ModelConfig) -> int:
        """Positions the engine is built for: asked for, or min(config, 4096)."""
        longest = config.max_position_embeddings
        if self.max_seq_len is None:
            return min(longest, DEFAULT_MAX_SEQ_LEN)
        if self.max_seq_len > longest:
            raise InputError(
                "usage.max_seq_len",
                f"--max-seq-len {self.max_seq_len} is beyond the model's {longest} positions",
                f"give at most {longest}",
            )
        return self.max_seq_len


def parse_size(text: str) -> int:
    """`1.5G`, `900MB`, `1000000` -> bytes (decimal units)."""
    plain = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = plain[-1:] if plain[-1:].isalpha() else ""
    try:
        size = float(plain[: len(plain) - len(unit)]) * SIZE_UNITS[unit]
    except (KeyError, ValueError):
        raise InputError("usage.size", f"{text!r} is not a size", "write 800M, 4G or a number of bytes") from None
    if not 0 < size < 10**18:
        raise InputError("usage.size", f"{text!r} is not a size", "write 800M, 4G or a number of bytes")
    return int(size)
