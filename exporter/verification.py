"""Verifying a finished artifact against the checkpoint it was built from: `enginesmith verify`."""

from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifact.load import Artifact
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import InputError
from exporter.core.progress import Progress
from targets.registry import get_target

if TYPE_CHECKING:
    from exporter.parity.report import VerifyReport


def verify_engine_directory(
    artifact: Artifact, against: Path, text: Path | None, threads: int, progress: Progress
) -> "VerifyReport":
    """The report on an opened artifact, passed or not. Raises InputError for another checkpoint's engine."""
    from exporter.parity.verify import EngineUnderTest, verify_artifact

    manifest = artifact.manifest
    checkpoint = Checkpoint.open(against)
    if checkpoint.digest != manifest.source_digest:
        raise InputError(
            "verify.other_checkpoint",
            f"{against} (digest {checkpoint.digest[:12]}) is not what the engine was built from "
            f"(digest {manifest.source_digest[:12]})",
            "give the checkpoint that the engine was built from",
        )
    target = get_target(manifest.target)
    subject = EngineUnderTest(target, artifact.path, checkpoint, manifest.recipe, manifest.limits, text, threads)
    return verify_artifact(subject, progress)
