"""What `build` and `plan` of the Python API may be told, by name."""

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

from exporter.calibration_request import CalibrationRequest
from exporter.core.device import DeviceOptions
from exporter.core.engine_options import EngineOptions
from exporter.options import BuildOptions

AnyPath = str | PathLike[str]
DEVICE = ("device", "mtriple", "mcpu", "tune_minutes")


class BuildChoices(TypedDict, total=False):
    """The options of `enginesmith build` under the same names; `BuildOptions` tells their defaults.

    `device`, `mtriple`, `mcpu`, `mattr`, `tune_minutes` and `tuning` are those of `DeviceOptions`; `calibration` is a
    text file, or a ready `CalibrationRequest`; `labels` go with `task="classify"`.
    """

    recipe: str | None
    force: bool
    tracer: str
    max_seq_len: int | None
    max_batch: int
    group_size: int | None
    lm_head: str | None
    embedding: str | None
    kv_cache: str | None
    min_coverage: float
    threads: int
    max_ram: int | None
    parity: bool
    text: AnyPath | None
    device: str | None
    mtriple: str | None
    mcpu: str | None
    mattr: Sequence[str]
    tune_minutes: float
    tuning: AnyPath | None
    qparams: AnyPath | None
    calibration: AnyPath | CalibrationRequest | None
    engine: EngineOptions
    task: str
    labels: Sequence[str]


def build_options(checkpoint: Path, out: Path, target: str, choices: BuildChoices) -> BuildOptions:
    """The options of a build from what was chosen. Raises TypeError for a name that is none of them."""
    if unknown := sorted(choices.keys() - BuildChoices.__annotations__.keys()):
        raise TypeError(f"unknown options: {', '.join(unknown)}")
    rest: dict[str, Any] = {**choices}
    device: dict[str, Any] = {name: rest.pop(name) for name in DEVICE if name in rest}
    device |= {"mattr": tuple(rest.pop("mattr", ())), "tuning": _path(rest.pop("tuning", None))}
    request = _request(rest.pop("qparams", None), rest.pop("calibration", None))
    rest |= {"text": _path(rest.pop("text", None)), "labels": _labels(rest.pop("labels", ()))}
    return BuildOptions(checkpoint, out, target, device=DeviceOptions(**device), calibration=request, **rest)


def _path(path: AnyPath | None) -> Path | None:
    return None if path is None else Path(path)


def _labels(given: Sequence[str]) -> tuple[str, ...]:
    """One text is split as the command line splits it, not into its letters."""
    return tuple(given.split(",") if isinstance(given, str) else given)


def _request(qparams: AnyPath | None, calibration: AnyPath | CalibrationRequest | None) -> CalibrationRequest:
    """Parameters or text; a request that is ready may be given where text alone says too little."""
    if isinstance(calibration, CalibrationRequest):
        return replace(calibration, qparams=_path(qparams) or calibration.qparams)
    return CalibrationRequest(qparams=_path(qparams), text=_path(calibration))
