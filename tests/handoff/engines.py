"""Tiny engines of the target onnxruntime with their hand-off files, as a build makes them."""

from pathlib import Path

import enginesmith
from calibration.coverage import coverage
from exporter.artifact.load import open_artifact
from exporter.artifact.manifest import MANIFEST, PrecisionTable, Source, write_manifest
from exporter.artifact.tokenizer_files import read_tokenizer
from exporter.handoff.files import write_handoff
from tests.artifact.sample import manifest
from tests.targets.engines import RECIPES, build, build_source

LABELS = ["safe", "unsafe", "class"]


def write_engine(checkpoint: Path, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    source = build_source(checkpoint, RECIPES["int4"])
    result = build(source, out).result
    read_tokenizer(checkpoint, source.config).write(out)
    built = manifest(
        source=Source(source.checkpoint.digest, source.config),
        recipe=source.recipe,
        coverage=PrecisionTable.from_json(coverage(source.config, source.recipe).to_json()),
        requirements=result.requirements,
        toolchain=result.toolchain,
        signature=result.signature,
        limits=source.limits,
        weights_bytes=result.weights_bytes,
    )
    write_handoff(built, out)
    write_manifest(out, built)
    return out


def write_classifier(checkpoint: Path, out: Path) -> Path:
    """For LABELS."""
    enginesmith.build(
        checkpoint,
        target="onnxruntime",
        recipe="int4-rtn",
        out=out,
        task="classify",
        labels=LABELS,
        max_batch=2,
        max_seq_len=40,
        parity=False,
    )
    manifest = open_artifact(out).manifest
    write_handoff(manifest, out)
    (out / MANIFEST).unlink()
    write_manifest(out, manifest)
    return out
