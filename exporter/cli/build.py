"""`enginesmith build` and `enginesmith plan`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from exporter.calibration_request import CalibrationRequest
from exporter.cli.app import EXTRA_ARGUMENTS, Debug, Json, app, refuse_extra
from exporter.cli.output import Output
from exporter.cli.recipe_options import (
    Calibration,
    Checkpoint,
    Embedding,
    GroupSize,
    LmHead,
    MaxKl,
    Rotate,
    Seed,
    TargetBits,
    TargetBytes,
    Threads,
    Tokens,
)
from exporter.core.device import DeviceOptions, parse_features
from exporter.core.engine_options import EngineOptions
from exporter.options import BuildOptions, parse_size

TargetName = Annotated[str, typer.Option("--target", help="Target, see `enginesmith targets`.")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="Preset or TOML file, see `enginesmith recipes`. Default: fp32, or that of --qparams."
    ),
]
Tracer = Annotated[str, typer.Option("--tracer", help="torch-export or torchscript.")]
SeqLen = Annotated[int | None, typer.Option("--max-seq-len", help="Positions in a row. Default: min(config, 4096).")]
MaxBatch = Annotated[int, typer.Option("--max-batch", help="Rows in a batch.")]
KvCache = Annotated[
    str | None,
    typer.Option("--kv-cache", help="Storage of keys and values: fp32, fp16, int8, fp8. Default: the target's."),
]
Coverage = Annotated[float, typer.Option("--min-coverage", help="Fraction of weights that must be quantized.")]
MaxRam = Annotated[str | None, typer.Option("--max-ram", help="Fail if more memory is needed: 900M, 4G.")]
Device = Annotated[str | None, typer.Option("--device", help="Build for this device, see `enginesmith targets`.")]
Triple = Annotated[str | None, typer.Option("--mtriple", help="Build for LLVM's triple: aarch64-linux-gnu.")]
Cpu = Annotated[str | None, typer.Option("--mcpu", help="Build for LLVM's CPU: cortex-a76.")]
Features = Annotated[str | None, typer.Option("--mattr", help="LLVM's CPU features: +dotprod,+fullfp16.")]
Tune = Annotated[float, typer.Option("--tune", metavar="MINUTES", help="Search kernel parameters this long.")]
Tuning = Annotated[Path | None, typer.Option("--tuning", help="File of tuning results to use, and to extend.")]
QParams = Annotated[Path | None, typer.Option("--qparams", help="Quantization parameters of `enginesmith calibrate`.")]
WorkDir = Annotated[
    Path | None, typer.Option("--work-dir", help="Keep calibrated layers here; an interrupted build goes on from them.")
]
TensorParallel = Annotated[int, typer.Option("--tp", help="Tensor parallel shards.")]
PipelineParallel = Annotated[int, typer.Option("--pp", help="Pipeline parallel stages.")]
Format = Annotated[
    str | None, typer.Option("--format", help="Form of a tensorrt-llm checkpoint: hf, trtllm, compressed-tensors.")
]
CompileEngine = Annotated[bool, typer.Option("--engine", help="Run the vendor's compiler on the checkpoint too.")]
OptBatch = Annotated[int | None, typer.Option("--opt-batch", help="tensorrt: rows that kernels are chosen for.")]
OptPrompt = Annotated[int | None, typer.Option("--opt-prompt", help="tensorrt: prompt that kernels are chosen for.")]
MaxPrompt = Annotated[int | None, typer.Option("--max-prompt", help="tensorrt: tokens of a step at most.")]
TimingCache = Annotated[Path | None, typer.Option("--timing-cache", help="tensorrt: kernel timings to use and extend.")]
VersionCompatible = Annotated[bool, typer.Option("--version-compatible", help="tensorrt: also for later runtimes.")]
HardwareCompatible = Annotated[bool, typer.Option("--hardware-compatible", help="tensorrt: also for later GPUs.")]
Task = Annotated[str, typer.Option("--task", help="generate, or classify: logits of the labels alone.")]
Labels = Annotated[str | None, typer.Option("--labels", help="Labels of --task classify: safe,unsafe.")]


@app.command(context_settings=EXTRA_ARGUMENTS)
def build(
    context: typer.Context,
    checkpoint: Checkpoint,
    target: TargetName,
    out: Annotated[Path, typer.Option("--out", help="Directory of the artifact.")],
    recipe: RecipeName = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing artifact.")] = False,
    tracer: Tracer = "torch-export",
    max_seq_len: SeqLen = None,
    max_batch: MaxBatch = 4,
    group_size: GroupSize = None,
    lm_head: LmHead = None,
    embedding: Embedding = None,
    kv_cache: KvCache = None,
    min_coverage: Coverage = 1.0,
    device: Device = None,
    mtriple: Triple = None,
    mcpu: Cpu = None,
    mattr: Features = None,
    tune: Tune = 0.0,
    tuning: Tuning = None,
    qparams: QParams = None,
    calibration: Calibration = None,
    calibration_tokens: Tokens = None,
    seed: Seed = 0,
    target_bits: TargetBits = None,
    target_bytes: TargetBytes = None,
    max_kl: MaxKl = None,
    rotate: Rotate = False,
    work_dir: WorkDir = None,
    threads: Threads = 0,
    max_ram: MaxRam = None,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    format: Format = None,
    engine: CompileEngine = False,
    opt_batch: OptBatch = None,
    opt_prompt: OptPrompt = None,
    max_prompt: MaxPrompt = None,
    timing_cache: TimingCache = None,
    version_compatible: VersionCompatible = False,
    hardware_compatible: HardwareCompatible = False,
    task: Task = "generate",
    labels: Labels = None,
    no_parity: Annotated[bool, typer.Option("--no-parity", help="Skip the parity checks; the proof says so.")] = False,
    report: Annotated[Path | None, typer.Option("--report", help="Write an HTML report here.")] = None,
    progress: Annotated[str, typer.Option("--progress", help="auto, plain, jsonl or none.")] = "auto",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Trace, fuse, quantize, compile, verify and package a checkpoint."""
    refuse_extra(context.args, _option_names(context))
    _build(_options(context.params), report, progress, context.obj)


def _build(options: BuildOptions, report: Path | None, style: str, output: Output) -> None:
    from exporter import api
    from exporter.cli.progress import close, make_progress
    from exporter.plan import stage_shares

    progress = make_progress(style, stage_shares(options))
    try:
        outcome = api.build_with(options, report=report, progress=progress)
    finally:
        close(progress)
    output.result(outcome.to_json(), outcome.describe())


@app.command(context_settings=EXTRA_ARGUMENTS)
def plan(
    context: typer.Context,
    checkpoint: Checkpoint,
    target: TargetName,
    recipe: RecipeName = None,
    tracer: Tracer = "torch-export",
    max_seq_len: SeqLen = None,
    max_batch: MaxBatch = 4,
    group_size: GroupSize = None,
    lm_head: LmHead = None,
    embedding: Embedding = None,
    kv_cache: KvCache = None,
    min_coverage: Coverage = 1.0,
    device: Device = None,
    mtriple: Triple = None,
    mcpu: Cpu = None,
    mattr: Features = None,
    qparams: QParams = None,
    calibration: Calibration = None,
    calibration_tokens: Tokens = None,
    seed: Seed = 0,
    target_bits: TargetBits = None,
    target_bytes: TargetBytes = None,
    max_kl: MaxKl = None,
    rotate: Rotate = False,
    max_ram: MaxRam = None,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    format: Format = None,
    engine: CompileEngine = False,
    opt_batch: OptBatch = None,
    opt_prompt: OptPrompt = None,
    max_prompt: MaxPrompt = None,
    timing_cache: TimingCache = None,
    version_compatible: VersionCompatible = False,
    hardware_compatible: HardwareCompatible = False,
    task: Task = "generate",
    labels: Labels = None,
    no_parity: Annotated[bool, typer.Option("--no-parity", help="Plan a build without parity checks.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a build would do and cost, from the config alone: no weight is read."""
    refuse_extra(context.args, _option_names(context))
    from exporter import api

    planned = api.plan_with(_options(context.params))
    output: Output = context.obj
    output.result(planned.to_json(), planned.describe())
    if planned.blocker:
        print(f"error: {planned.blocker.message}\n  what to do: {planned.blocker.remedy}", file=sys.stderr)
        raise typer.Exit(planned.blocker.exit_code)


def _options(given: dict[str, Any]) -> BuildOptions:
    """The options of both commands from their parameters by name; what `plan` lacks has its default."""
    plain = ("target", "recipe", "tracer", "max_seq_len", "max_batch", "group_size", "lm_head", "embedding", "kv_cache")
    return BuildOptions(
        checkpoint=Path(given["checkpoint"]),
        out=_path(given.get("out")) or Path(),
        force=given.get("force", False),
        min_coverage=given["min_coverage"],
        threads=given.get("threads", 0),
        max_ram=_size(given["max_ram"]),
        parity=not given["no_parity"],
        device=_device(given),
        calibration=_calibration(given),
        engine=_engine(given),
        task=given["task"],
        labels=tuple(given["labels"].split(",")) if given["labels"] is not None else (),
        **{name: given[name] for name in plain},
    )


def _device(given: dict[str, Any]) -> DeviceOptions:
    features, tuning = parse_features(given["mattr"]), _path(given.get("tuning"))
    return DeviceOptions(given["device"], given["mtriple"], given["mcpu"], features, given.get("tune", 0.0), tuning)


def _engine(given: dict[str, Any]) -> EngineOptions:
    return EngineOptions(
        tensor_parallel=given["tp"],
        pipeline_parallel=given["pp"],
        format=given["format"],
        compile_engine=given["engine"],
        opt_batch=given["opt_batch"],
        opt_prompt=given["opt_prompt"],
        max_prompt=given["max_prompt"],
        timing_cache=_path(given["timing_cache"]),
        version_compatible=given["version_compatible"],
        hardware_compatible=given["hardware_compatible"],
    )


def _calibration(given: dict[str, Any]) -> CalibrationRequest:
    return CalibrationRequest(
        qparams=_path(given["qparams"]),
        text=_path(given["calibration"]),
        tokens=given["calibration_tokens"],
        seed=given["seed"],
        target_bits=given["target_bits"],
        target_bytes=_size(given["target_bytes"]),
        max_kl=given["max_kl"],
        rotate=given["rotate"],
        work_dir=_path(given.get("work_dir")),
    )


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _size(given: str | None) -> int | None:
    return parse_size(given) if given else None


def _option_names(context: typer.Context) -> list[str]:
    parameters: list[Any] = context.command.params
    return [name for parameter in parameters for name in parameter.opts if name.startswith("--")]
