"""Opening an artifact: nothing of it is used before every file is known to be the one that was built."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from exporter.artifact.digests import FileEntry, damaged_files
from exporter.artifact.external_data import ExternalData, external_data
from exporter.artifact.host import HostError, check_host
from exporter.artifact.json_fields import damaged
from exporter.artifact.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, artifact_digest, decode_manifest
from exporter.artifact.paths import path_fault
from exporter.core.errors import ArtifactError, InputError
from targets.registry import TARGETS

MAX_ENTRIES = 100_000
MAX_ONNX_BYTES = 2 << 30  # protobuf's own limit
AGAIN = "copy the engine again, or build it again"
DISTRUST = "do not use this engine; build it again from a checkpoint you trust"


@dataclass(frozen=True)
class Artifact:
    """A verified artifact. `digest` is the SHA-256 of manifest.json, the identity `--expect-digest` compares."""

    path: Path
    manifest: Manifest
    digest: str


def open_artifact(path: Path | str, expect_digest: str | None = None, host: bool = True) -> Artifact:
    """Check an artifact completely: manifest, names, sizes, digests, external data, and whether it runs here.

    `host=False` leaves out the last, to look at an engine for another machine. Raises InputError
    (no such directory) or ArtifactError (`artifact.*`). Runs no code of the artifact.
    """
    path = Path(path)
    data = _read_manifest(path)
    digest = artifact_digest(data)
    if expect_digest is not None:
        _compare_digest(path, digest, expect_digest)
    manifest = decode_manifest(data)
    if manifest.target not in TARGETS:
        raise ArtifactError(
            "artifact.target",
            f"the engine was built for the target {manifest.target!r}, unknown to this version",
            "install the enginesmith version that built it, or a newer one",
        )
    if host and (mismatches := check_host(manifest.triple, manifest.requirements)):
        raise HostError(mismatches)
    check_files(path, manifest.files)
    return Artifact(path, manifest, digest)


def _read_manifest(path: Path) -> bytes:
    if not os.path.lexists(path):
        raise InputError("artifact.not_found", f"no such engine: {path}", "give the directory that build wrote")
    if not path.is_dir():
        raise InputError("artifact.not_found", f"{path} is not a directory", "give the directory that build wrote")
    file = path / MANIFEST
    try:
        mode = file.lstat()
    except FileNotFoundError:
        raise ArtifactError(
            "artifact.manifest", f"{path} has no {MANIFEST}: it is not an engine", "give the directory that build wrote"
        ) from None
    _require_plain(mode.st_mode, MANIFEST)
    if mode.st_size > MAX_MANIFEST_BYTES:
        raise damaged(f"it has {mode.st_size} bytes, more than {MAX_MANIFEST_BYTES}")
    return file.read_bytes()


def _compare_digest(path: Path, actual: str, expected: str) -> None:
    wanted = expected.lower().removeprefix("sha256:")
    if wanted != actual:
        raise ArtifactError(
            "artifact.expect_digest",
            f"{path} has the digest {actual}, expected was {wanted}",
            "this is another engine than the one asked for, or it was changed",
        )


def check_files(path: Path, entries: tuple[FileEntry, ...]) -> None:
    """Hold a directory to its file entries. Raises ArtifactError for the first difference found."""
    _check_names(path, {entry.path: entry for entry in entries})
    if broken := damaged_files(path, entries):
        raise ArtifactError("artifact.digest", f"damaged: {', '.join(broken[:5])}", AGAIN)
    sizes = {entry.path: entry.bytes for entry in entries}
    for entry in entries:
        if entry.path.endswith(".onnx"):
            _check_onnx(path, entry, sizes)


def _check_names(path: Path, listed: dict[str, FileEntry]) -> None:
    """Exactly the listed files are there, plain, with the listed sizes; no other directory, no link."""
    folders = {parent.as_posix() for name in listed for parent in PurePosixPath(name).parents}
    found: set[str] = set()
    for count, (name, mode, size) in enumerate(_walk(path)):
        if count > MAX_ENTRIES:
            raise ArtifactError("artifact.stray_file", f"{path} holds more than {MAX_ENTRIES} files", AGAIN)
        if stat.S_ISDIR(mode) and name in folders:
            continue
        _require_plain(mode, name)
        if name == MANIFEST:
            continue
        if name not in listed:
            raise ArtifactError("artifact.stray_file", f"{name!r} does not belong to the engine", "remove it")
        if size != listed[name].bytes:
            raise ArtifactError("artifact.size", f"{name!r} has {size} bytes instead of {listed[name].bytes}", AGAIN)
        found.add(name)
    if missing := sorted(listed.keys() - found):
        raise ArtifactError("artifact.missing_file", f"{missing[0]!r} is missing", AGAIN)


def _walk(path: Path) -> "list[tuple[str, int, int]]":
    """(relative name, mode, size) of everything below, links not followed; breadth first, bounded."""
    found: list[tuple[str, int, int]] = []
    pending = [""]
    while pending and len(found) <= MAX_ENTRIES + 1:
        folder = pending.pop()
        with os.scandir(path / folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                status = entry.stat(follow_symlinks=False)
                name = f"{folder}{entry.name}"
                found.append((name, status.st_mode, status.st_size))
                if stat.S_ISDIR(status.st_mode):
                    pending.append(f"{name}/")
    return found


def _require_plain(mode: int, name: str) -> None:
    if stat.S_ISLNK(mode):
        raise ArtifactError("artifact.symlink", f"{name!r} is a symbolic link", DISTRUST)
    if stat.S_ISDIR(mode):
        raise ArtifactError("artifact.stray_file", f"the directory {name!r} does not belong to the engine", "remove it")
    if not stat.S_ISREG(mode):
        raise ArtifactError("artifact.special_file", f"{name!r} is not a plain file", DISTRUST)


def _check_onnx(path: Path, entry: FileEntry, sizes: dict[str, int]) -> None:
    if entry.bytes > MAX_ONNX_BYTES:
        raise ArtifactError("artifact.external_data", f"{entry.path!r} is larger than protobuf allows", DISTRUST)
    folder = PurePosixPath(entry.path).parent
    for tensor in external_data((path / entry.path).read_bytes()):
        if fault := _external_fault(tensor, folder, sizes):
            raise ArtifactError(
                "artifact.external_data", f"{entry.path!r} keeps a tensor where it must not: {fault}", DISTRUST
            )


def _external_fault(tensor: ExternalData, folder: PurePosixPath, sizes: dict[str, int]) -> str | None:
    locations = tensor.values("location")
    if len(locations) != 1:
        return f"it gives {len(locations)} locations"
    if fault := path_fault(locations[0]):
        return f"{locations[0]!r}: {fault}"
    size = sizes.get((folder / locations[0]).as_posix())
    if size is None:
        return f"{locations[0]!r} is not a file of the engine"
    numbers = [*tensor.values("offset"), *tensor.values("length")]
    if not all(number.isascii() and number.isdigit() and len(number) < 20 for number in numbers):
        return f"offset or length is not a number: {numbers}"
    if sum(map(int, numbers)) > size:
        return f"it ends at byte {sum(map(int, numbers))} of {locations[0]!r}, which has {size}"
    return None
