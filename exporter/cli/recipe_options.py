"""Options that `build`, `plan` and `calibrate` share: the checkpoint, what of a recipe is overridden, and the text."""

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Hugging Face checkpoint directory (safetensors).")
]
GroupSize = Annotated[int | None, typer.Option("--group-size", help="Weights that share a scale.")]
LmHead = Annotated[str | None, typer.Option("--lm-head", help="Precision of the head: int4, int6, int8/g64, bf16 ...")]
Embedding = Annotated[str | None, typer.Option("--embedding", help="Precision of the embedding.")]
Threads = Annotated[int, typer.Option("--threads", help="Threads; 0: one per physical core.")]
Calibration = Annotated[
    Path | None, typer.Option("--calibration", help="Calibrate on this text: plain, or JSONL with text or messages.")
]
Tokens = Annotated[int | None, typer.Option("--calibration-tokens", help="Tokens to calibrate on. Default: 65536.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling of text, and of rotations.")]
TargetBits = Annotated[float | None, typer.Option("--target-bits", help="Recipe auto: bits per weight at most.")]
TargetBytes = Annotated[str | None, typer.Option("--target-bytes", help="Recipe auto: size of the weights at most.")]
MaxKl = Annotated[float | None, typer.Option("--max-kl", help="Recipe auto: mean KL to eager at most.")]
Rotate = Annotated[bool, typer.Option("--rotate", help="Rotate residual stream and heads first (integer recipes).")]
