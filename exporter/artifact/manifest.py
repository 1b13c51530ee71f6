"""The manifest: what an engine is, where it came from, what it needs, and a digest of every file.

docs/artifact.md describes it for readers, docs/manifest.schema.json for machines. It holds no times
and no host names: two builds of one input write the same bytes.
"""

import hashlib
import os
import stat
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from calibration.recipe_json import recipe_from_json, recipe_to_json
from exporter.artifact.calibration_record import CalibrationRecord, record_from_json
from exporter.artifact.config_json import ARCHITECTURE, config_from_json, config_to_json
from exporter.artifact.digests import FileEntry, hash_files
from exporter.artifact.json_fields import Fields, canonical_json, damaged, is_digest, parse_object
from exporter.artifact.older_manifests import upgrade
from exporter.artifact.paths import path_fault
from exporter.core.config import ModelConfig
from exporter.core.errors import ArtifactError, EngineSmithError
from exporter.core.labelled import labelled_config
from exporter.core.recipe import Recipe
from exporter.core.task import GENERATE, Task
from targets.base import Limits

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
SEAL = "manifest_sha256"
MAX_MANIFEST_BYTES = 16 << 20
MAX_FILE_BYTES = 1 << 44
MAX_TOKEN = 1 << 22


@dataclass(frozen=True)
class Source:
    """The checkpoint: `digest` is `Checkpoint.digest`, `config` what running needs of it (`raw` is not kept)."""

    digest: str
    config: ModelConfig


@dataclass(frozen=True)
class TensorPrecision:
    """Requested and actual precision of one tensor (`int4/g32`, `fp32`), and why they differ if they do."""

    name: str
    requested: str
    actual: str
    why: str = ""


@dataclass(frozen=True)
class PrecisionTable:
    """Coverage as built: fraction at the requested precision, bits per weight (scales included), per tensor."""

    fraction: float
    bits_per_weight: float
    tensors: tuple[TensorPrecision, ...]

    @staticmethod
    def from_json(value: dict[str, Any]) -> "PrecisionTable":
        """From the `coverage` object of `plan --json`, which manifests repeat."""
        fields = Fields(value, "coverage")
        table = PrecisionTable(
            fields.number("fraction"),
            fields.number("bits_per_weight"),
            tuple(_tensor(item) for item in fields.items("tensors")),
        )
        fields.done()
        return table


@dataclass(frozen=True)
class Manifest:
    """One artifact. `requirements`, `signature` and `engine` (its `report`) are as in `targets.base.BuildResult`;
    `parity` is the result of `verify` (None if it was skipped), `proof` what stands behind it; `calibration` None:
    there was none."""

    enginesmith: str
    source: Source
    recipe: Recipe
    coverage: PrecisionTable
    target: str
    triple: str
    requirements: dict[str, Any]
    toolchain: dict[str, str]
    signature: dict[str, Any]
    limits: Limits
    weights_bytes: int
    parity: dict[str, Any] | None
    proof: dict[str, Any]
    files: tuple[FileEntry, ...] = ()
    calibration: CalibrationRecord | None = None
    task: Task = GENERATE
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        """The engine's architecture: the checkpoint's for its task."""
        return labelled_config(self.source.config, self.task)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, the manifest not counted."""
        return sum(entry.bytes for entry in self.files)

    @property
    def recipe_name(self) -> str:
        return self.recipe.name

    @property
    def bits_per_weight(self) -> float:
        return self.coverage.bits_per_weight

    @property
    def source_digest(self) -> str:
        return self.source.digest

    def to_json(self) -> dict[str, Any]:
        """The JSON object, without its seal."""
        config = self.source.config
        return {
            "schema_version": SCHEMA_VERSION,
            "enginesmith": self.enginesmith,
            "source": {
                "architecture": ARCHITECTURE,
                "digest": self.source.digest,
                "config": config_to_json(config),
            },
            "recipe": {**recipe_to_json(self.recipe), "description": describe(self.recipe)},
            "calibration": self.calibration.to_json() if self.calibration else None,
            "coverage": {**asdict(self.coverage), "tensors": [asdict(tensor) for tensor in self.coverage.tensors]},
            "task": {**asdict(self.task), "labels": list(self.task.labels), "token_ids": list(self.task.token_ids)},
            "engine": self.engine,
            "target": self.target,
            "triple": self.triple,
            "requirements": self.requirements,
            "toolchain": self.toolchain,
            "signature": self.signature,
            "limits": asdict(self.limits),
            "weights_bytes": self.weights_bytes,
            "eos_token_ids": list(config.eos_token_ids),
            "bos_token_id": config.bos_token_id,
            "pad_token_id": config.pad_token_id,
            "files": [{**asdict(entry), "chunks": list(entry.chunks)} for entry in self.files],
            "parity": self.parity,
            "proof": self.proof,
        }


def describe(recipe: Recipe) -> str:
    """A recipe in one line for people."""
    parts = ", ".join(f"{part} {getattr(recipe, part).describe()}" for part in ("linear", "lm_head", "embedding"))
    others = f", {len(recipe.overrides)} patterns of layers otherwise" if recipe.overrides else ""
    algorithms = f", {' then '.join(recipe.algorithms)}" if recipe.algorithms else ""
    return f"{parts}, kv_cache {recipe.kv_cache}{others}{algorithms}"


def write_manifest(directory: Path, manifest: Manifest) -> tuple[Manifest, str]:
    """Hash every file of a finished directory and write manifest.json, last.

    Returns the manifest with its files, and the artifact's digest.
    """
    complete = replace(manifest, files=hash_files(directory, _list_files(directory)))
    data = encode_manifest(complete)
    (directory / MANIFEST).write_bytes(data)
    return complete, artifact_digest(data)


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, sealed: a flipped bit anywhere in it is noticed."""
    value = manifest.to_json()
    return canonical_json({**value, SEAL: _seal(value)})


def artifact_digest(manifest_bytes: bytes) -> str:
    """The identity of a whole artifact: SHA-256 of manifest.json, which names the digest of every file."""
    return hashlib.sha256(manifest_bytes).hexdigest()


def decode_manifest(data: bytes) -> Manifest:
    """Read manifest.json. Raises ArtifactError: `artifact.newer` for a later schema, else `artifact.manifest`."""
    value = parse_object(data)
    version = Fields(value, "manifest.json").integer("schema_version", 1, 1 << 31)
    if version > SCHEMA_VERSION:
        raise ArtifactError(
            "artifact.newer",
            f"the engine has manifest schema {version}, this version reads up to {SCHEMA_VERSION}",
            "install a newer enginesmith",
        )
    seal = value.pop(SEAL, None)
    if seal != _seal(value) or canonical_json({**value, SEAL: seal}) != data:
        raise damaged(f"its {SEAL} does not match its contents")
    value = upgrade(value, version)
    manifest = _manifest(Fields(value, "manifest.json"))
    if manifest.to_json() != value:
        raise damaged("its fields contradict one another")
    return manifest


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _manifest(fields: Fields) -> Manifest:
    fields.integer("schema_version", 1, SCHEMA_VERSION)
    limits = fields.object("limits")
    manifest = Manifest(
        enginesmith=fields.text("enginesmith"),
        source=_source(fields),
        recipe=_recipe(fields.mapping("recipe")),
        calibration=_calibration(fields),
        task=_task(fields.object("task")),
        engine=fields.mapping("engine"),
        coverage=PrecisionTable.from_json(fields.mapping("coverage")),
        target=fields.text("target"),
        triple=fields.text("triple"),
        requirements=_requirements(fields.mapping("requirements")),
        toolchain=fields.text_mapping("toolchain"),
        signature=fields.mapping("signature"),
        limits=Limits(limits.integer("max_batch", 1, 1 << 16), limits.integer("max_seq_len", 1, 1 << 26)),
        weights_bytes=fields.integer("weights_bytes", 0, MAX_FILE_BYTES),
        parity=fields.optional_mapping("parity"),
        proof=fields.mapping("proof"),
        files=_files(fields.items("files")),
    )
    fields.done()
    _check_labels(manifest)
    return manifest


def _check_labels(manifest: Manifest) -> None:
    try:
        labelled_config(manifest.source.config, manifest.task)
    except EngineSmithError as error:
        raise damaged(error.message) from error


def _source(fields: Fields) -> Source:
    source = fields.object("source")
    if source.text("architecture") != ARCHITECTURE:
        raise damaged("its architecture is unknown")
    eos = fields.items("eos_token_ids")
    ids = [fields.optional_integer(name, 0, MAX_TOKEN) for name in ("bos_token_id", "pad_token_id")]
    return Source(source.digest("digest"), config_from_json(source.mapping("config"), eos, *ids))


def _recipe(value: dict[str, Any]) -> Recipe:
    """`description` is for people: whether it fits is seen when the manifest is written again."""
    try:
        return recipe_from_json({name: field for name, field in value.items() if name != "description"})
    except EngineSmithError as error:
        raise damaged(error.message) from error


def _task(fields: Fields) -> Task:
    kind, labels = fields.text("kind"), tuple(fields.texts("labels"))
    token_ids = tuple(fields.items("token_ids"))
    fields.done()
    if any(isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < MAX_TOKEN for token in token_ids):
        raise damaged("the tokens of its labels are no token ids")
    try:
        return Task(kind, labels, token_ids)
    except EngineSmithError as error:
        raise damaged(error.message) from error


def _calibration(fields: Fields) -> CalibrationRecord | None:
    value = fields.optional_mapping("calibration")
    return None if value is None else record_from_json(value)


def _tensor(value: object) -> TensorPrecision:
    fields = Fields(value, "a tensor of coverage")
    tensor = TensorPrecision(*(fields.text(name) for name in ("name", "requested", "actual", "why")))
    fields.done()
    return tensor


def _requirements(value: dict[str, Any]) -> dict[str, Any]:
    if "cpu_features" in value:
        Fields(value, "requirements").texts("cpu_features")
    return value


def _files(items: list[Any]) -> tuple[FileEntry, ...]:
    entries = tuple(_entry(Fields(item, "an entry of files")) for item in items)
    names: set[str] = {MANIFEST}
    for entry in entries:
        fault = path_fault(entry.path) or ("it is listed twice" if entry.path in names else None)
        if fault:
            raise ArtifactError(
                "artifact.path", f"the manifest names the file {entry.path!r}: {fault}", "do not use this engine"
            )
        names.add(entry.path)
    return entries


def _entry(fields: Fields) -> FileEntry:
    chunks = fields.texts("chunks")
    entry = FileEntry(
        fields.text("path"), fields.integer("bytes", 0, MAX_FILE_BYTES), fields.digest("sha256"), tuple(chunks)
    )
    fields.done()
    if len(chunks) != entry.expected_chunks or not all(is_digest(chunk) for chunk in chunks):
        raise damaged(f"the chunk digests of {entry.path!r} do not fit its size")
    return entry


def _list_files(directory: Path) -> list[str]:
    """Every file below a directory as sorted relative paths; links and special files are a builder's mistake."""
    found = []
    for root, folders, names in os.walk(directory):
        for name in [*folders, *names]:
            path = Path(root, name)
            mode = path.lstat().st_mode
            relative = path.relative_to(directory).as_posix()
            if stat.S_ISREG(mode) and not path_fault(relative):
                found.append(relative)
            elif not stat.S_ISDIR(mode):
                raise ValueError(f"a target wrote {relative!r}, which is not a plain file with a portable name")
    return sorted(name for name in found if name != MANIFEST)
