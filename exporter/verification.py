"""Verifying a finished artifact against the checkpoint it was built from: `enginesmith verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

from calibration.qparams import QParams
from exporter.artifact.load import Artifact
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import InputError
from exporter.core.labelled import labelled
from exporter.core.progress import Progress
from exporter.recipe_numbers import calibrated_numbers, plain_numbers
from targets.registry import get_target

if TYPE_CHECKING:
    from exporter.parity.engine import LogitSink
    from exporter.parity.report import VerifyReport


def verify_engine_directory(
    artifact: Artifact,
    against: Path,
    text: Path | None,
    threads: int,
    progress: Progress,
    qparams: Path | None = None,
    seen: "LogitSink | None" = None,
) -> "VerifyReport":
    """The report on an opened artifact, passed or not.

    `qparams` are the quantization parameters of a calibrated engine; without them it is held to eager alone. `seen` is
    shown the engine's logits. Raises
    InputError for another checkpoint's engine, or for parameters that the engine was not built with.
    """
    from exporter.parity.verify import EngineUnderTest, verify_artifact

    manifest = artifact.manifest
    parameters = _parameters(artifact, qparams)
    checkpoint = Checkpoint.open(against)
    if checkpoint.digest != manifest.source_digest:
        raise InputError(
            "verify.other_checkpoint",
            f"{against} (digest {checkpoint.digest[:12]}) is not what the engine was built from "
            f"(digest {manifest.source_digest[:12]})",
            "give the checkpoint that the engine was built from",
        )
    if parameters is not None:
        parameters.check(checkpoint)
    checkpoint = labelled(checkpoint, manifest.task)
    target, numbers = get_target(manifest.target), None
    if parameters is not None:
        numbers = calibrated_numbers(checkpoint, manifest.recipe, parameters, target, threads)
    elif manifest.calibration is None:
        numbers = plain_numbers(checkpoint, threads)
    if numbers is not None:
        numbers = numbers.served(target, manifest.recipe, manifest.engine.get("form"))
    subject = EngineUnderTest(
        target,
        artifact.path,
        checkpoint,
        manifest.recipe,
        manifest.limits,
        text,
        threads,
        built_by=str(manifest.proof.get("built_by") or ""),
    )
    return verify_artifact(subject, progress, numbers, seen)


def _parameters(artifact: Artifact, qparams: Path | None) -> QParams | None:
    """The file of parameters, if it is the one that the engine was built with."""
    if qparams is None:
        return None
    record = artifact.manifest.calibration
    if record is None:
        what = f"{artifact.path} was built without quantization parameters"
        raise InputError("verify.qparams", what, "leave --qparams out")
    parameters = QParams.open(qparams)
    if parameters.digest != record.qparams:
        raise InputError(
            "verify.qparams",
            f"{qparams} (digest {parameters.digest[:12]}) is not what the engine was built with "
            f"(digest {record.qparams[:12]})",
            "give the file that the engine was built with, or leave --qparams out",
        )
    return parameters
