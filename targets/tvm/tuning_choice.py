"""Which tuning a build uses: none asked for, one from a file, or one searched for now."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.core.errors import InputError
from exporter.core.machine import cpu_model
from targets.base import BuildSource, DeviceOptions
from targets.tvm.devices import Device
from targets.tvm.tuning import DEFAULT, Tuning, TuningFile, check_writable, read_tuning, shape_key
from targets.tvm.tuning_search import search

if TYPE_CHECKING:
    from targets.tvm.lower.program import LoweredModel


@dataclass(frozen=True)
class TuningChoice:
    """The tuning of a build, and the results to keep beside the engine (None where nothing was asked for)."""

    tuning: Tuning = DEFAULT
    kept: TuningFile | None = None


def known_results(options: DeviceOptions, device: Device) -> TuningFile:
    """What `--tuning` holds, or nothing yet. Raises InputError when it is for another CPU or profile, when it is no
    such file, or when a CPU is to be tuned that this machine is not."""
    if options.tune_minutes and device.foreign:
        raise InputError(
            "tuning.foreign",
            f"{device.name} cannot be tuned on this machine: its kernels do not run here",
            "run --tune on such a machine with --tuning FILE, then build here with that file",
        )
    if options.tune_minutes and options.tuning is not None:
        check_writable(options.tuning)
    here = cpu_model()
    if options.tuning is None or (options.tune_minutes and not options.tuning.exists()):
        return TuningFile(device.isa.name, here)
    known = read_tuning(options.tuning)
    known.check(device.isa.name, None if device.foreign else here)
    return known


def choose_tuning(
    source: BuildSource, device: Device, model: "LoweredModel", report: Callable[[float, str], None]
) -> TuningChoice:
    """Reads, or searches for and writes, as the source's device options say. Raises InputError."""
    options = source.device
    if not options.tune_minutes and options.tuning is None:
        return TuningChoice()
    known, key = known_results(options, device), shape_key(source.config, source.recipe)
    if options.tune_minutes:
        from targets.tvm.tuning_measure import LayerTimer

        with LayerTimer(model, device) as timer:
            start = known.found.get(key, DEFAULT)
            best = search(device.isa, start, 60 * options.tune_minutes, timer.compare, report)
        known = known.with_result(key, best)
        if options.tuning is not None:
            known.write(options.tuning)
    elif key not in known.found:
        raise InputError(
            "tuning.shape",
            f"the tuning results know nothing of this model ({key}); they hold: {'; '.join(known.found) or 'nothing'}",
            "add --tune MINUTES to extend the file, or leave --tuning out",
        )
    return TuningChoice(known.found[key], TuningFile(known.profile, known.cpu, {key: known.found[key]}))
