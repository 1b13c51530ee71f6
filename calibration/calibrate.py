"""A calibration from end to end: text flows through the checkpoint layer by layer, and one file holds what it found.

At any time there is one decoder layer in memory, read from the checkpoint when its turn comes. The activations of all
sequences lie in memory as far as it reaches, beyond that in the work directory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from calibration.activation_store import Activations, ActivationStore, batches
from calibration.auto import AutoBudget
from calibration.coverage import AUTO, coverage, gate, prospective
from calibration.data import CalibrationData
from calibration.forecast import BATCH_TOKENS, activation_bytes, forecast_bytes, store_budget, working_bytes
from calibration.qparams import QParams
from calibration.qparams_writer import QParamsWriter
from calibration.resolved_recipe import Report, resolved
from calibration.transformed import with_transforms
from calibration.transforms import POINTS, FoldNorms, RotateHeads, RotateResidual, Transform
from calibration.work_directory import WorkDirectory, work_directory
from exporter.core.checkpoint import EMBEDDING, Checkpoint
from exporter.core.errors import InputError
from exporter.core.machine import physical_cores
from exporter.core.memory import release_free_memory
from exporter.core.progress import Progress
from exporter.core.recipe import NEEDING_DATA, Recipe
from exporter.core.scattered_rows import row_ranges, rows_of
from exporter.core.threads import check_threads
from exporter.core.weights import read_layer, read_tensor_rows

__all__ = ["CalibrateOptions", "activation_bytes", "calibrate", "forecast_bytes", "rotations", "working_bytes"]


@dataclass(frozen=True)
class CalibrateOptions:
    """How a calibration works. `work_dir` None: a temporary one beside the output. `max_ram` in bytes. `threads` 0: one
    per physical core. `seed` of the rotations. `budget` is for the recipe `auto`."""

    work_dir: Path | None = None
    max_ram: int | None = None
    threads: int = 0
    seed: int = 0
    min_coverage: float = 1.0
    budget: AutoBudget = field(default_factory=AutoBudget)

    def __post_init__(self) -> None:
        check_threads(self.threads)


def calibrate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    data: CalibrationData | None,
    out: Path,
    options: CalibrateOptions,
    progress: Progress,
) -> QParams:
    """Calibrate and write `out`. The caller opens the stage of `progress`; it is advanced here.

    `data` may be None where only transforms are asked for. Raises InputError (`recipe.needs_data`,
    `calibrate.not_finite`, `work_dir.*`), BudgetError (`coverage.missed`, `memory.calibrate`).
    """
    config = checkpoint.config
    recipe = prospective(config, recipe)
    # What `auto` cannot measure at any precision it cannot choose one for.
    gate(coverage(config, recipe), 1.0 if recipe.name == AUTO else options.min_coverage)
    if data is None:
        _require_no_data(recipe)
        return _write_transforms(checkpoint, recipe, out, options)
    budget = store_budget(config, recipe, data.ids.shape[1], options.max_ram)
    binding, transforms = _binding(checkpoint, recipe, data, options), rotations(recipe, options.seed)
    with _torch_threads(options.threads), work_directory(options.work_dir, out, binding) as work:
        source = with_transforms(checkpoint, transforms)
        recipe, report, progress = resolved(source, recipe, data, options.budget, work, progress)
        gate(coverage(config, recipe), options.min_coverage)
        run = _Run(source, transforms, recipe, data, work, ActivationStore(work.path, budget), progress)
        run.layers()
        found = run.write(out, report)
        work.clear()
    return found


def rotations(recipe: Recipe, seed: int) -> tuple[Transform, ...]:
    """The transforms of the algorithm `rotate`: norms folded, residual stream and heads rotated."""
    if "rotate" not in recipe.algorithms:
        return ()
    return FoldNorms(), RotateResidual(seed), RotateHeads(seed)


def _require_no_data(recipe: Recipe) -> None:
    if recipe.needs_data:
        asks = [name for name in recipe.algorithms if name in NEEDING_DATA]
        why = ", ".join(asks) if asks else "scales of activations or of the KV cache"
        raise InputError(
            "recipe.needs_data",
            f"recipe {recipe.name!r} needs text to calibrate on ({why})",
            "give a file of text: --calibration FILE",
        )


def _write_transforms(checkpoint: Checkpoint, recipe: Recipe, out: Path, options: CalibrateOptions) -> QParams:
    with QParamsWriter(out, source_digest=checkpoint.digest, recipe=recipe) as writer:
        for transform in rotations(recipe, options.seed):
            writer.add_transform(transform)
        return writer.finish()


def _binding(
    checkpoint: Checkpoint, recipe: Recipe, data: CalibrationData, options: CalibrateOptions
) -> dict[str, object]:
    """What a work directory is bound to. Threads take part: sums in another order end in other digits."""
    return {
        "format": "enginesmith calibration 1",
        "checkpoint": checkpoint.digest,
        "recipe": asdict(recipe),
        "data": {**data.summary.to_json(), "ids_sha256": data.digest},
        "seed": options.seed,
        "budget": asdict(options.budget),
        "threads": options.threads or physical_cores(),
    }


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or physical_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Run:
    """One calibration at work. `checkpoint`: the source as its rotations, `transforms`, leave it."""

    checkpoint: Checkpoint
    transforms: tuple[Transform, ...]
    recipe: Recipe
    data: CalibrationData
    work: WorkDirectory
    store: ActivationStore
    progress: Progress

    def __post_init__(self) -> None:
        self.config = self.checkpoint.config
        n, length = self.data.ids.shape
        self.shape = (n, length, self.config.hidden_size)
        self.batch = max(1, BATCH_TOKENS // length)

    def layers(self) -> None:
        """All layers that are not finished yet, then the head; a part file for each."""
        finished, layers = self.work.finished, self.config.num_layers
        if finished > layers:
            return
        hidden = self._embed() if not finished else self.store.open(self.work.hidden(finished - 1), self.shape)
        for layer in range(finished, layers):
            hidden = self._layer(layer, hidden)
        self._tell(layers, "head")
        self._head(hidden)
        self.store.drop(hidden)

    def write(self, out: Path, report: Report) -> QParams:
        """All parts in one file, and what `auto` reports."""
        with self._writer(out) as writer:
            for transform in self.transforms:
                writer.add_transform(transform)
            for number in range(self.config.num_layers + 1):
                writer.add_part(QParams.open(self.work.part(number)))
            if report:
                writer.add_report(AUTO, report)
            return writer.finish()

    def _layer(self, layer: int, hidden: Activations) -> Activations:
        from calibration.decoder import DecoderLayer
        from calibration.layer_run import LayerRun

        decoder = DecoderLayer(self.config, read_layer(self.checkpoint, layer), self.shape[1])
        with self._writer(self.work.part(layer), f"layer {layer}") as writer:
            run = LayerRun(
                layer, self.recipe, decoder, self.store, self.batch, writer, lambda what: self._tell(layer, what)
            )
            leaving = run.run(hidden)
            if self.work.resumable:
                leaving.save(self.work.hidden(layer), self.batch)
            writer.finish()
        self.store.drop(hidden)
        if self.work.resumable and layer:
            self.work.hidden(layer - 1).unlink(missing_ok=True)
        release_free_memory()
        return leaving

    def _head(self, hidden: Activations) -> None:
        from calibration.head_run import run_head

        with self._writer(self.work.part(self.config.num_layers), "head") as writer:
            run_head(self.checkpoint, self.recipe, hidden, self.batch, writer)
            writer.finish()
        release_free_memory()

    def _writer(self, path: Path, part: str | None = None) -> QParamsWriter:
        return QParamsWriter(
            path,
            source_digest=self.checkpoint.digest,
            recipe=self.recipe,
            data=self.data.summary.to_json(),
            part=part,
        )

    def _embed(self) -> Activations:
        """The residual stream that enters layer 0; of the embedding only the rows that occur are read."""
        hidden = self.store.make(self.shape)
        for start, stop in batches(self.shape[0], self.batch):
            ids = self.data.ids[start:stop]
            occurring = np.unique(ids)
            pieces = (read_tensor_rows(self.checkpoint, EMBEDDING, *bounds) for bounds in row_ranges(occurring))
            rows = rows_of(occurring, pieces)
            hidden.write(start, rows[np.searchsorted(occurring, ids)])
        return hidden

    def _tell(self, layer: int, what: str) -> None:
        part = POINTS.index(what) / len(POINTS) if what in POINTS else 0.0
        total = self.config.num_layers + 1
        where = f"layer {layer + 1} of {self.config.num_layers}: " if layer < self.config.num_layers else ""
        self.progress.advance((layer + part) / total, where + what.replace("_", " "))
