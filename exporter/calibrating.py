"""Calibration as the command line and the API ask for it: files are checked, text is read, parameters are written."""

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.presets import load_recipe
from exporter.calibration_request import NO_CALIBRATION, CalibrationRequest
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.disk import output_errors
from exporter.core.errors import InputError
from exporter.core.progress import NoProgress, Progress, stage
from exporter.core.recipe import Recipe
from exporter.core.temporary_directory import CALIBRATION, create
from exporter.memory import peak_resident_bytes

if TYPE_CHECKING:
    from calibration.calibrate import CalibrateOptions
    from calibration.data import CalibrationData, Renderer
    from calibration.qparams import QParams
    from exporter.options import BuildOptions


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of `enginesmith calibrate`; None means the default that the documentation states.

    `request` holds the text, how much of it, the seed, the goal of recipe `auto`, and the work directory. `length`:
    tokens of a sequence.
    """

    checkpoint: Path
    recipe: str
    out: Path
    request: CalibrationRequest = field(default_factory=lambda: NO_CALIBRATION)
    length: int | None = None
    group_size: int | None = None
    lm_head: str | None = None
    embedding: str | None = None
    kv_cache: str | None = None
    max_ram: int | None = None
    threads: int = 0
    force: bool = False


@dataclass(frozen=True)
class CalibrationOutcome:
    """The file that was written, and what it took."""

    path: Path
    parameters: "QParams"
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        found = self.parameters
        return {
            "out": str(self.path),
            "digest": found.digest,
            "bytes": self.path.stat().st_size,
            "recipe": found.recipe.name,
            "algorithms": list(found.recipe.algorithms),
            "transforms": len(found.transforms),
            "data": None if found.data is None else dict(found.data),
            "reports": {name: dict(report) for name, report in found.reports.items()},
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
        }

    def describe(self) -> str:
        """For people."""
        found = self.parameters
        data = found.data or {}
        text = f"{data['tokens']} tokens in {data['sequences']} sequences" if data else "no text"
        size = self.path.stat().st_size
        return (
            f"{self.path}: recipe {found.recipe.name}, {text}, {size / 1e6:.1f} MB\n"
            f"  {self.seconds:.0f} s, {self.peak_rss_bytes / 1e9:.2f} GB of memory, digest {found.digest[:16]}"
        )


def calibrate_with(options: CalibrationOptions, progress: Progress | None = None) -> CalibrationOutcome:
    """Calibrate a checkpoint directory. Raises InputError, UnsupportedError or BudgetError; nothing is left then, but
    what a named work directory needs to go on."""
    from calibration.calibrate import calibrate

    begun, progress = time.monotonic(), progress or NoProgress()
    with stage(progress, "prepare"):
        recipe = _recipe(options)
        _check_out(options.out, options.force, options.checkpoint)
        checkpoint = Checkpoint.open(options.checkpoint)
        data = load_data(checkpoint, options.request, options.length)
    with stage(progress, "calibrate"), output_errors(options.out):
        work = calibrate_options(options.request, options.max_ram, options.threads)
        found = calibrate(checkpoint, recipe, data, options.out, work, progress)
    return CalibrationOutcome(options.out, found, time.monotonic() - begun, peak_resident_bytes())


def calibrate_for_build(
    checkpoint: Checkpoint, recipe: Recipe, options: "BuildOptions", progress: Progress
) -> "QParams":
    """Calibrate within a build: the file lies beside the output as long as somebody holds the result."""
    from calibration.calibrate import calibrate

    data = load_data(checkpoint, options.calibration)
    with output_errors(options.out):
        options.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder = create(options.out, CALIBRATION)
    try:
        work = replace(
            calibrate_options(options.calibration, options.max_ram, options.threads), min_coverage=options.min_coverage
        )
        found = calibrate(checkpoint, recipe, data, folder.path / "parameters.qparams", work, progress)
    except BaseException:
        folder.remove()
        raise
    weakref.finalize(found, folder.remove)
    return found


def forecast_for_build(config: ModelConfig, recipe: Recipe, options: "BuildOptions") -> int:
    """The most memory that calibrating within a build holds; activations go to disk where --max-ram is small."""
    from calibration.forecast import forecast_bytes, working_bytes

    tokens = options.calibration.tokens or _default_tokens()
    expected = forecast_bytes(config, recipe, tokens)
    if options.max_ram is None:
        return expected
    return min(expected, max(working_bytes(config, recipe), options.max_ram))


def load_data(
    checkpoint: Checkpoint, request: CalibrationRequest, length: int | None = None
) -> "CalibrationData | None":
    """The sequences of the request's text; None where it has none."""
    if request.text is None:
        return None
    from calibration.data import DEFAULT_LENGTH, load

    return load(
        request.text,
        checkpoint.path,
        checkpoint.config,
        tokens=request.tokens or _default_tokens(),
        length=DEFAULT_LENGTH if length is None else length,
        seed=request.seed,
        render=chat_renderer(checkpoint),
    )


def chat_renderer(checkpoint: Checkpoint) -> "Renderer | None":
    """Writes chats as the checkpoint's template does; None where it has none."""
    from exporter.artifact.tokenizer_files import CHAT_TEMPLATE, read_tokenizer
    from exporter.runtime.chat import ChatTemplate, read_special_tokens

    source = read_tokenizer(checkpoint.path, checkpoint.config).files.get(CHAT_TEMPLATE)
    if source is None:
        return None
    template = ChatTemplate(source.decode(), read_special_tokens(checkpoint.path))

    def render(messages: Sequence[dict[str, Any]]) -> str:
        return template.render(messages, add_generation_prompt=False)

    return render


def calibrate_options(request: CalibrationRequest, max_ram: int | None, threads: int) -> "CalibrateOptions":
    """The driver's options for a request."""
    from calibration.auto import AutoBudget
    from calibration.calibrate import CalibrateOptions

    budget = AutoBudget(request.target_bits, request.target_bytes, request.max_kl)
    return CalibrateOptions(request.work_dir, max_ram, threads, request.seed, budget=budget)


def _default_tokens() -> int:
    from calibration.data import DEFAULT_TOKENS

    return DEFAULT_TOKENS


def _recipe(options: CalibrationOptions) -> Recipe:
    recipe = load_recipe(
        options.recipe,
        group_size=options.group_size,
        lm_head=options.lm_head,
        embedding=options.embedding,
        kv_cache=options.kv_cache,
        rotate=options.request.rotate,
    )
    if not recipe.calibrated and recipe.kv_cache != "int8":
        raise InputError(
            "calibrate.nothing",
            f"recipe {recipe.name!r} has nothing to calibrate: its numbers come from the weights alone",
            f"build with it directly: enginesmith build CHECKPOINT --recipe {options.recipe} ...",
        )
    options.request.check_recipe(recipe)
    if recipe.kv_cache == "int8" and not recipe.calibrated and options.request.text is None:
        raise InputError(
            "recipe.needs_data", "scales of an int8 KV cache come from text", "give a file of text: --calibration FILE"
        )
    return recipe


def _check_out(out: Path, force: bool, checkpoint: Path) -> None:
    """Refuse an output that is there already, before any work."""
    if out.is_dir():
        raise InputError("output.directory", f"{out} is a directory", "give the name of a file to --out")
    if out.exists() and not force:
        raise InputError("output.exists", f"{out} exists", "give --force to replace it, or another --out")
    if not out.absolute().parent.is_dir():
        raise InputError("output.missing", f"{out.parent} does not exist", "give a file in a directory to --out")
    if out.absolute().parent.resolve() == checkpoint.resolve() and out.suffix == ".safetensors":
        what = f"{out} would lie among the weights of the checkpoint"
        raise InputError("output.checkpoint", what, "choose another directory, or another suffix")
