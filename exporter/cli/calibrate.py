"""`enginesmith calibrate`: quantization parameters of a checkpoint from text, in one file."""

from pathlib import Path
from typing import Annotated

import typer

from exporter.cli.app import Debug, Json, app
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
from exporter.options import parse_size

Recipe = Annotated[str, typer.Option("--recipe", help="Preset or TOML file, see `enginesmith recipes`.")]
Out = Annotated[Path, typer.Option("--out", help="File of quantization parameters to write.")]
Length = Annotated[int | None, typer.Option("--calibration-length", help="Tokens of a sequence. Default: 512.")]
KvCache = Annotated[str | None, typer.Option("--kv-cache", help="Storage of keys and values: fp32, fp16, int8, fp8.")]
MaxRam = Annotated[str | None, typer.Option("--max-ram", help="Memory to stay within: 3G; activations go to disk.")]
WorkDir = Annotated[
    Path | None, typer.Option("--work-dir", help="Keep finished layers here; an interrupted run goes on from them.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
ProgressStyle = Annotated[str, typer.Option("--progress", help="auto, plain, jsonl or none.")]


@app.command()
def calibrate(
    context: typer.Context,
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Out,
    calibration: Calibration = None,
    calibration_tokens: Tokens = None,
    calibration_length: Length = None,
    seed: Seed = 0,
    group_size: GroupSize = None,
    lm_head: LmHead = None,
    embedding: Embedding = None,
    kv_cache: KvCache = None,
    rotate: Rotate = False,
    target_bits: TargetBits = None,
    target_bytes: TargetBytes = None,
    max_kl: MaxKl = None,
    max_ram: MaxRam = None,
    work_dir: WorkDir = None,
    threads: Threads = 0,
    force: Force = False,
    progress: ProgressStyle = "auto",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Find scales, codes and transforms of a recipe on text; `build --qparams` uses them for every target."""
    from exporter.calibrating import CalibrationOptions, calibrate_with
    from exporter.calibration_request import CalibrationRequest
    from exporter.cli.progress import close, make_progress

    goal = parse_size(target_bytes) if target_bytes else None
    request = CalibrationRequest(
        None, calibration, calibration_tokens, seed, target_bits, goal, max_kl, rotate, work_dir
    )
    options = CalibrationOptions(
        checkpoint=checkpoint,
        recipe=recipe,
        out=out,
        request=request,
        length=calibration_length,
        group_size=group_size,
        lm_head=lm_head,
        embedding=embedding,
        kv_cache=kv_cache,
        max_ram=parse_size(max_ram) if max_ram else None,
        threads=threads,
        force=force,
    )
    shown = make_progress(progress, {"prepare": 1, "calibrate": 99})
    try:
        outcome = calibrate_with(options, shown)
    finally:
        close(shown)
    output: Output = context.obj
    output.result(outcome.to_json(), outcome.describe())
