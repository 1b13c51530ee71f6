"""What a build will cost, from the config alone: memory, disk, engine size, coverage; no weight is read."""

import math
from dataclasses import dataclass

from calibration.coverage import Coverage, coverage, gate
from calibration.presets import load_recipe
from exporter.core.config import ModelConfig
from exporter.core.errors import BudgetError, EngineSmithError, UnsupportedError
from exporter.core.recipe import Recipe, kv_cache_bytes
from exporter.options import BuildOptions
from targets.base import Limits, Target
from targets.registry import get_target

# Measured on x86-64 with torch 2.13 (docs/benchmarks.md): what a process holds whatever the model.
TRACE_BYTES = 520e6
STREAM_BYTES = 60e6
RUNTIME_BYTES = 120e6
GRAPH_AND_TOKENIZER_BYTES = 1e6
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
    """The forecast. `blocker` is the error the build would end with before reading a weight, or None."""

    target: str
    recipe: str
    support: str
    engine_bytes: int
    disk_bytes: int
    stages: tuple[StagePlan, ...]
    unsupported: tuple[str, ...]
    coverage: Coverage
    blocker: EngineSmithError | None

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
        return "\n".join(lines + [f"note: {note}" for note in self.unsupported])


def make_plan(options: BuildOptions) -> Plan:
    """Plan a build. Raises InputError or UnsupportedError where there is nothing to plan (no config, no target)."""
    target = get_target(options.target)
    config = ModelConfig.from_directory(options.checkpoint)
    target.check_device(options.device)
    recipe = requested_recipe(options, target)
    covered = coverage(config, recipe, target.scale_bits, target.code_bits)
    limits = Limits(options.max_batch, options.sequence_limit(config))
    support = target.supports(config, recipe)
    blocker = first_blocker(options, target, config, recipe, covered)
    notes = [support.why] if support.level != "native" and support.why else []
    notes += [f"{tensor.name}: {tensor.why}" for tensor in covered.tensors if tensor.why]
    engine = engine_bytes(config, covered)
    return Plan(
        target=target.name,
        recipe=recipe.name,
        support=support.level,
        engine_bytes=engine,
        disk_bytes=engine,
        stages=tuple(plan_stages(config, recipe, engine, limits, options.parity)),
        unsupported=tuple(notes),
        coverage=covered,
        blocker=blocker,
    )


def requested_recipe(options: BuildOptions, target: Target) -> Recipe:
    """The recipe with the options' overrides applied, and the target's choice of what nobody named."""
    return load_recipe(
        options.recipe,
        group_size=options.group_size,
        lm_head=options.lm_head,
        embedding=options.embedding,
        kv_cache=options.kv_cache,
        complete=target.complete,
    )


def first_blocker(
    options: BuildOptions, target: Target, config: ModelConfig, recipe: Recipe, covered: Coverage
) -> EngineSmithError | None:
    """The error a build ends with before reading a weight: an unsupported recipe or missed coverage."""
    support = target.supports(config, recipe)
    if not support.usable:
        return UnsupportedError(f"target.{target.name}", support.why, support.remedy)
    try:
        gate(covered, options.min_coverage)
    except BudgetError as error:
        return error
    return None


def engine_bytes(config: ModelConfig, covered: Coverage) -> int:
    """Bytes of the artifact: weights at their precision, norms and tables, tokenizer."""
    shapes = config.tensor_shapes.values()
    vectors = sum(shape[0] for shape in shapes if len(shape) == 1)
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    return int(matrices * covered.bits_per_weight / 8 + 4 * vectors + GRAPH_AND_TOKENIZER_BYTES)


def plan_stages(config: ModelConfig, recipe: Recipe, engine: int, limits: Limits, parity: bool) -> list[StagePlan]:
    """Peak memory of each stage, in order."""
    stages = [("trace", TRACE_BYTES), ("fuse", TRACE_BYTES), ("quantize", TRACE_BYTES)]
    stages.append(("compile", TRACE_BYTES + STREAM_BYTES))
    if parity:
        layer = 4 * sum(math.prod(shape) for shape in config.linear_shapes.values())
        heads = 2 * config.num_layers * config.num_kv_heads
        cache = heads * kv_cache_bytes(recipe.kv_cache, config.head_dim) * limits.max_seq_len
        rows = 4 * PARITY_TOKENS * (config.hidden_size * 8 + config.intermediate_size)
        streaming = TRACE_BYTES + 3 * layer + rows + HEAD_BLOCK * 4
        running = TRACE_BYTES + RUNTIME_BYTES + engine + cache
        stages.append(("verify", max(streaming, running)))
    stages.append(("package", TRACE_BYTES))
    return [StagePlan(name, int(size)) for name, size in stages]


def check_memory_budget(
    options: BuildOptions, config: ModelConfig, recipe: Recipe, covered: Coverage, limits: Limits
) -> None:
    """Raise BudgetError before any work if the forecast does not fit `--max-ram`."""
    if options.max_ram is None:
        return
    stages = plan_stages(config, recipe, engine_bytes(config, covered), limits, options.parity)
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
    shares = {"check": 0.3, "trace": 6.0, "fuse": 1.0, "quantize": 0.3, "compile": 0.5 + parameters / 200e6}
    if options.parity:
        shares["verify"] = 3.0 + parameters / 12e6
    shares["package"] = 0.2 + parameters / 2e9
    return shares
