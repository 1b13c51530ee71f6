"""What a build will cost, from the config alone: memory, disk, engine size, coverage; no weight is read."""

import math
from dataclasses import asdict, dataclass

from calibration.coverage import Coverage, coverage, gate, prospective
from calibration.qparams import QParams
from calibration.transforms import FoldNorms, transformed_config
from exporter.artifact.tokenizer_files import tokenizer_bytes
from exporter.core.config import ModelConfig
from exporter.core.errors import BudgetError, EngineSmithError, InputError, UnsupportedError
from exporter.core.labelled import labelled_config
from exporter.core.recipe import Recipe, kv_cache_bytes
from exporter.core.task import Task
from exporter.labels import LabelToken, named_labels
from exporter.matrix_sources import MatrixSource, grouped, matrix_sources
from exporter.options import BuildOptions
from exporter.parity.inputs import check_positions
from exporter.requested_recipe import requested_recipe
from exporter.requested_task import requested_task
from targets.base import Limits, Target
from targets.registry import get_target

# Measured on x86-64 with torch 2.13 (docs/benchmarks.md): what a process holds whatever the model.
TRACE_BYTES = 520e6
STREAM_BYTES = 60e6
RUNTIME_BYTES = 120e6
# Parity keeps the residual stream of all rows, and the logits of one block of them, in float32.
PARITY_TOKENS = 2048
HEAD_BLOCK = 64 << 20


@dataclass(frozen=True)
class StagePlan:
    """One stage with the most memory it is expected to hold."""

    name: str
    peak_ram_bytes: int


@dataclass(frozen=True)
class Plan:
    """The forecast. `blocker` is the error the build would end with before reading a weight, or None; `matrices` says
    what a file of quantization parameters gives, `labels` which token stands for each label of a classifier."""

    target: str
    recipe: str
    support: str
    engine_bytes: int
    disk_bytes: int
    stages: tuple[StagePlan, ...]
    unsupported: tuple[str, ...]
    coverage: Coverage
    blocker: EngineSmithError | None
    matrices: tuple[MatrixSource, ...] = ()
    labels: tuple[LabelToken, ...] = ()

    @property
    def peak_ram_bytes(self) -> int:
        return max(stage.peak_ram_bytes for stage in self.stages)

    def to_json(self) -> dict[str, object]:
        """The `plan` object of the contract; with an `error` beside it where the build would fail."""
        plan: dict[str, object] = {
            "target": self.target,
            "recipe": self.recipe,
            "support": self.support,
            "peak_ram_bytes": self.peak_ram_bytes,
            "disk_bytes": self.disk_bytes,
            "engine_bytes": self.engine_bytes,
            "stages": [dict(stage.__dict__) for stage in self.stages],
            "unsupported": list(self.unsupported),
            "coverage": self.coverage.to_json(),
            "matrices": [asdict(matrix) for matrix in self.matrices],
            "labels": [asdict(label) for label in self.labels],
        }
        return {**plan, "error": self.blocker.to_json()} if self.blocker else plan

    def describe(self) -> str:
        """The plan for people."""
        lines = [
            f"{self.recipe} for {self.target}: {self.support}",
            f"engine       {self.engine_bytes / 1e6:,.0f} MB ({self.coverage.bits_per_weight:.2f} bits per weight)",
            f"disk         {self.disk_bytes / 1e6:,.0f} MB while building",
            f"peak memory  {self.peak_ram_bytes / 1e6:,.0f} MB",
            f"coverage     {self.coverage.fraction:.1%} of the quantizable weights",
        ]
        lines += [f"  {stage.name:<9} {stage.peak_ram_bytes / 1e6:,.0f} MB" for stage in self.stages]
        lines += [f"parameters   {line}" for line in grouped(self.matrices)]
        lines += [label.describe() for label in self.labels]
        return "\n".join(lines + [f"note: {note}" for note in self.unsupported])


def make_plan(options: BuildOptions) -> Plan:
    """Plan a build. Raises InputError or UnsupportedError where there is nothing to plan (no config, no target)."""
    target = get_target(options.target)
    source = ModelConfig.from_directory(options.checkpoint)
    limits = Limits(options.max_batch, options.sequence_limit(source))
    target.check_options(options.device, options.engine, limits)
    task = requested_task(options, source)
    parameters = open_parameters(options, source)
    recipe, config = requested_recipe(options, target, source, parameters), labelled_config(source, task)
    recipe = recipe if parameters else prospective(config, recipe)
    options.calibration.check_recipe(recipe, target.calibrated_caches)
    built = built_config(config, recipe)
    covered = coverage(built, recipe, target.matrix_bits)
    support = target.supports(config, recipe, options.device, options.engine, task)
    blocker = first_blocker(options, target, config, recipe, covered, task)
    notes = [support.why] if support.level != "native" and support.why else []
    notes += [f"{tensor.name}: {tensor.why}" for tensor in covered.tensors if tensor.why]
    notes += data_notes(options, recipe, target)
    engine = engine_bytes(options, built, covered, limits)
    return Plan(
        target=target.name,
        recipe=recipe.name,
        support=support.level,
        engine_bytes=engine,
        disk_bytes=engine,
        stages=tuple(plan_stages(options, config, recipe, engine, limits)),
        unsupported=tuple(notes),
        coverage=covered,
        blocker=blocker,
        matrices=matrix_sources(target, covered, recipe, source, parameters),
        labels=tuple(named_labels(options.checkpoint, task, source)),
    )


def data_notes(options: BuildOptions, recipe: Recipe, target: Target) -> list[str]:
    """What a build would still need of its user."""
    error = options.calibration.missing_data(recipe, target.calibrated_caches)
    return [f"{error.message}: {error.remedy}"] if error else []


def open_parameters(options: BuildOptions, config: ModelConfig) -> QParams | None:
    """The file of `--qparams`, its header read and checked, also against the architecture."""
    path = options.calibration.qparams
    if path is None:
        return None
    parameters = QParams.open(path)
    parameters.check_config(config)
    return parameters


def built_config(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """The architecture of the engine: a rotation unties the head from the embedding."""
    return transformed_config(config, (FoldNorms(),)) if "rotate" in recipe.algorithms else config


def first_blocker(
    options: BuildOptions, target: Target, config: ModelConfig, recipe: Recipe, covered: Coverage, task: Task
) -> EngineSmithError | None:
    """The error a build ends with before reading a weight: an unsupported recipe, missed coverage, rows that are too
    short for the parity checks."""
    support = target.supports(config, recipe, options.device, options.engine, task)
    if not support.usable:
        return UnsupportedError(f"target.{target.name}", support.why, support.remedy)
    try:
        gate(covered, options.min_coverage)
        if options.parity:
            check_positions(options.sequence_limit(config))
    except (BudgetError, InputError) as error:
        return error
    return None


def engine_bytes(options: BuildOptions, config: ModelConfig, covered: Coverage, limits: Limits) -> int:
    """Bytes of the artifact: matrices as the target stores them, vectors and rotary tables in float32, tokenizer,
    graph or library, and what separates tensors, which start on pages of 4096 bytes."""
    shapes = config.tensor_shapes.values()
    vectors = sum(shape[0] for shape in shapes if len(shape) == 1)
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    weights = matrices * covered.bits_per_weight / 8 + 4 * (vectors + limits.max_seq_len * config.head_dim)
    footprint = get_target(options.target).footprint
    program = footprint.program_bytes + footprint.layer_bytes * config.num_layers
    return int(footprint.copies * weights + tokenizer_bytes(options.checkpoint) + program)


def plan_stages(
    options: BuildOptions, config: ModelConfig, recipe: Recipe, engine: int, limits: Limits
) -> list[StagePlan]:
    """Peak memory of each stage, in order."""
    stages = [("calibrate", calibration_bytes(options, config, recipe))]
    stages = stages if options.calibration.calibrates(recipe) else []
    stages += [("trace", TRACE_BYTES), ("fuse", TRACE_BYTES), ("quantize", TRACE_BYTES)]
    footprint = get_target(options.target).footprint
    stages.append(("compile", TRACE_BYTES + STREAM_BYTES + footprint.compile_share * engine / footprint.copies))
    if options.parity:
        layer = 4 * sum(math.prod(shape) for shape in config.linear_shapes.values())
        heads = 2 * config.num_layers * config.num_kv_heads
        cache = heads * kv_cache_bytes(recipe.kv_cache, config.head_dim) * limits.max_seq_len
        rows = 4 * PARITY_TOKENS * (config.hidden_size * 8 + config.intermediate_size)
        streaming = TRACE_BYTES + 3 * layer + rows + HEAD_BLOCK * 4
        # A classifier takes whole prompts, and shows its hidden states of the longest in one piece.
        boundaries = config.num_layers + 1 if config.classifies else 0
        states = 4 * boundaries * config.hidden_size * limits.max_seq_len
        running = TRACE_BYTES + RUNTIME_BYTES + engine + cache + states
        stages.append(("verify", max(streaming, running)))
    stages.append(("package", TRACE_BYTES))
    return [StagePlan(name, int(size)) for name, size in stages]


def calibration_bytes(options: BuildOptions, config: ModelConfig, recipe: Recipe) -> float:
    """The most that calibrating holds."""
    from exporter.calibrating import forecast_for_build

    return float(forecast_for_build(config, recipe, options))


def check_memory_budget(
    options: BuildOptions, config: ModelConfig, recipe: Recipe, covered: Coverage, limits: Limits
) -> None:
    """Raise BudgetError before any work if the forecast does not fit `--max-ram`."""
    if options.max_ram is None:
        return
    engine = engine_bytes(options, built_config(config, recipe), covered, limits)
    stages = plan_stages(options, config, recipe, engine, limits)
    worst = max(stages, key=lambda stage: stage.peak_ram_bytes)
    if worst.peak_ram_bytes > options.max_ram:
        raise BudgetError(
            "memory.forecast",
            f"stage {worst.name} is expected to need {worst.peak_ram_bytes / 1e9:.2f} GB, "
            f"--max-ram allows {options.max_ram / 1e9:.2f} GB",
            "allow more memory, or build with --no-parity",
        )


def stage_shares(options: BuildOptions) -> dict[str, float]:
    """Expected seconds of each stage, for the progress display; rough on purpose."""
    try:
        parameters = ModelConfig.from_directory(options.checkpoint).parameter_count
    except EngineSmithError:
        parameters = 0
    calibration = options.calibration
    first = {"calibrate": 5 + parameters / 2e6} if calibration.text or calibration.rotate else {}
    shares = {"check": 0.3, **first, "trace": 6.0, "fuse": 1.0, "quantize": 0.3, "compile": 0.5 + parameters / 200e6}
    if options.parity:
        shares["verify"] = 3.0 + parameters / 12e6
    shares["package"] = 0.2 + parameters / 2e9
    return shares
