"""What an artifact is, after its files were checked: `enginesmith inspect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.artifact.host import check_host
from exporter.artifact.load import open_artifact
from exporter.artifact.manifest import Manifest


@dataclass(frozen=True)
class Inspection:
    """A checked artifact. `host` is None unless the host was asked about; True means it fits."""

    path: Path
    digest: str
    manifest: Manifest
    host: bool | None

    @property
    def engine_bytes(self) -> int:
        return self.manifest.total_bytes

    def to_json(self) -> dict[str, Any]:
        """The manifest with the artifact's digest and size."""
        return {
            "path": str(self.path),
            "digest": self.digest,
            "engine_bytes": self.engine_bytes,
            "fits_host": self.host,
            "manifest": self.manifest.to_json(),
        }

    def describe(self) -> str:
        """The artifact for people."""
        manifest = self.manifest
        proof = manifest.proof
        state = "passed" if proof.get("engine_run") else "not run"
        lines = [
            f"target     {manifest.target} ({manifest.triple})",
            f"recipe     {manifest.recipe_name}, {manifest.bits_per_weight:.2f} bits per weight",
            f"limits     {manifest.limits.max_batch} rows of {manifest.limits.max_seq_len} positions",
            f"size       {self.engine_bytes / 1e6:,.1f} MB in {len(manifest.files)} files",
            f"source     {manifest.source_digest}",
            *([f"task       {manifest.task.describe()}"] if manifest.task.classifies else []),
            *([f"calibrated {manifest.calibration.describe()}"] if manifest.calibration else []),
            f"parity     engine {state}; built by {proof.get('built_by')}",
            f"digest     {self.digest}",
        ]
        if self.host:
            lines.append("host       this machine fits")
        return "\n".join(lines)


def inspect_artifact(path: Path, for_host: bool, expect_digest: str | None) -> Inspection:
    """Open and describe. Raises ArtifactError for damage, another digest, or (with `for_host`) a host that differs."""
    artifact = open_artifact(path, expect_digest=expect_digest, host=for_host)
    fits = not check_host(artifact.manifest.triple, artifact.manifest.requirements) if for_host else None
    return Inspection(artifact.path, artifact.digest, artifact.manifest, fits)
