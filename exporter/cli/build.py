"""`enginesmith build` and `enginesmith plan`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from exporter.cli.app import EXTRA_ARGUMENTS, LATER_NOTE, Debug, Json, app, refuse_extra
from exporter.cli.output import Output
from exporter.core.device import DeviceOptions, parse_features
from exporter.core.errors import UnsupportedError
from exporter.options import BuildOptions, parse_size

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Hugging Face checkpoint directory (safetensors).")
]
TargetName = Annotated[str, typer.Option("--target", help="Target, see `enginesmith targets`.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="Preset or TOML file, see `enginesmith recipes`.")]
Tracer = Annotated[str, typer.Option("--tracer", help="torch-export or torchscript.")]
SeqLen = Annotated[int | None, typer.Option("--max-seq-len", help="Positions in a row. Default: min(config, 4096).")]
MaxBatch = Annotated[int, typer.Option("--max-batch", help="Rows in a batch.")]
GroupSize = Annotated[int | None, typer.Option("--group-size", help="Weights that share a scale.")]
LmHead = Annotated[str | None, typer.Option("--lm-head", help="Precision of the head: int4, int6, int8/g64, bf16 ...")]
Embedding = Annotated[str | None, typer.Option("--embedding", help="Precision of the embedding.")]
KvCache = Annotated[
    str | None,
    typer.Option("--kv-cache", help="Storage of keys and values: fp32, fp16 or int8. Default: the target's."),
]
Coverage = Annotated[float, typer.Option("--min-coverage", help="Fraction of weights that must be quantized.")]
Threads = Annotated[int, typer.Option("--threads", help="Threads; 0: one per physical core.")]
MaxRam = Annotated[str | None, typer.Option("--max-ram", help="Fail if more memory is needed: 900M, 4G.")]
Device = Annotated[str | None, typer.Option("--device", help="Build for this device, see `enginesmith targets`.")]
Triple = Annotated[str | None, typer.Option("--mtriple", help="Build for LLVM's triple: aarch64-linux-gnu.")]
Cpu = Annotated[str | None, typer.Option("--mcpu", help="Build for LLVM's CPU: cortex-a76.")]
Features = Annotated[str | None, typer.Option("--mattr", help="LLVM's CPU features: +dotprod,+fullfp16.")]
Tune = Annotated[float, typer.Option("--tune", metavar="MINUTES", help="Search kernel parameters this long.")]
Tuning = Annotated[Path | None, typer.Option("--tuning", help="File of tuning results to use, and to extend.")]
Task = Annotated[str, typer.Option("--task", help="generate")]


@app.command(context_settings=EXTRA_ARGUMENTS, epilog=LATER_NOTE)
def build(
    context: typer.Context,
    checkpoint: Checkpoint,
    target: TargetName,
    out: Annotated[Path, typer.Option("--out", help="Directory of the artifact.")],
    recipe: RecipeName = "fp32",
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
    threads: Threads = 0,
    max_ram: MaxRam = None,
    task: Task = "generate",
    no_parity: Annotated[bool, typer.Option("--no-parity", help="Skip the parity checks; the proof says so.")] = False,
    report: Annotated[Path | None, typer.Option("--report", help="Write an HTML report here.")] = None,
    progress: Annotated[str, typer.Option("--progress", help="auto, plain, jsonl or none.")] = "auto",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Trace, fuse, quantize, compile, verify and package a checkpoint."""
    refuse_extra(context.args, _option_names(context))
    _require_generate(task)
    options = BuildOptions(
        checkpoint=checkpoint,
        out=out,
        target=target,
        recipe=recipe,
        force=force,
        tracer=tracer,
        max_seq_len=max_seq_len,
        max_batch=max_batch,
        group_size=group_size,
        lm_head=lm_head,
        embedding=embedding,
        kv_cache=kv_cache,
        min_coverage=min_coverage,
        threads=threads,
        max_ram=parse_size(max_ram) if max_ram else None,
        parity=not no_parity,
        device=DeviceOptions(device, mtriple, mcpu, parse_features(mattr), tune, tuning),
    )
    _build(options, report, progress, context.obj)


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


@app.command(context_settings=EXTRA_ARGUMENTS, epilog=LATER_NOTE)
def plan(
    context: typer.Context,
    checkpoint: Checkpoint,
    target: TargetName,
    recipe: RecipeName = "fp32",
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
    task: Task = "generate",
    no_parity: Annotated[bool, typer.Option("--no-parity", help="Plan a build without parity checks.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a build would do and cost, from the config alone: no weight is read."""
    refuse_extra(context.args, _option_names(context))
    _require_generate(task)
    from exporter import api

    options = BuildOptions(
        checkpoint=checkpoint,
        out=Path(),
        target=target,
        recipe=recipe,
        tracer=tracer,
        max_seq_len=max_seq_len,
        max_batch=max_batch,
        group_size=group_size,
        lm_head=lm_head,
        embedding=embedding,
        kv_cache=kv_cache,
        min_coverage=min_coverage,
        parity=not no_parity,
        device=DeviceOptions(device, mtriple, mcpu, parse_features(mattr)),
    )
    planned = api.plan_with(options)
    output: Output = context.obj
    output.result(planned.to_json(), planned.describe())
    if planned.blocker:
        print(f"error: {planned.blocker.message}\n  what to do: {planned.blocker.remedy}", file=sys.stderr)
        raise typer.Exit(planned.blocker.exit_code)


def _require_generate(task: str) -> None:
    if task != "generate":
        raise UnsupportedError("option.task", f"task {task!r} is not available yet", "leave --task out")


def _option_names(context: typer.Context) -> list[str]:
    parameters: list[Any] = context.command.params
    return [name for parameter in parameters for name in parameter.opts if name.startswith("--")]
