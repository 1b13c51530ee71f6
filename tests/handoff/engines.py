"""A tiny engine of the target onnxruntime with its hand-off files, made as a build makes it."""

from pathlib import Path

from calibration.coverage import coverage
from exporter.artifact.manifest import PrecisionTable, Source, write_manifest
from exporter.artifact.tokenizer_files import read_tokenizer
from exporter.handoff.files import write_handoff
from tests.artifact.sample import manifest
from tests.targets.engines import RECIPES, build, build_source


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
