"""Opening an artifact refuses whatever is not exactly what was built."""

import os
import random
import shutil
import socket
from pathlib import Path

import pytest

from exporter.artifact import digests, load
from exporter.artifact.load import open_artifact
from exporter.core.errors import ArtifactError, InputError
from tests.artifact.sample import external_tensor, manifest, onnx_model, reseal, write_artifact


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "engine")


def kind_of(path: Path, expect_digest: str | None = None) -> str:
    with pytest.raises(ArtifactError) as caught:
        open_artifact(path, expect_digest)
    assert caught.value.exit_code == 5 and caught.value.message and caught.value.remedy
    return caught.value.kind


def test_a_sound_artifact_opens(engine: Path) -> None:
    artifact = open_artifact(engine)
    assert artifact.path == engine and len(artifact.digest) == 64
    assert open_artifact(str(engine), artifact.digest) == artifact
    assert open_artifact(engine, f"sha256:{artifact.digest.upper()}") == artifact


def test_another_digest_is_refused(engine: Path) -> None:
    assert kind_of(engine, "00" * 32) == "artifact.expect_digest"


def test_no_such_directory_is_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(InputError) as caught:
            open_artifact(path)
        assert caught.value.kind == "artifact.not_found"


def test_a_directory_without_manifest(engine: Path) -> None:
    (engine / "manifest.json").unlink()
    assert kind_of(engine) == "artifact.manifest"


def test_an_endless_manifest(engine: Path) -> None:
    with (engine / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    assert kind_of(engine) == "artifact.manifest"


def test_missing_stray_and_resized_files(engine: Path) -> None:
    (engine / "tokenizer.json").unlink()
    assert kind_of(engine) == "artifact.missing_file"
    (engine / "tokenizer.json").write_text("{} ")
    assert kind_of(engine) == "artifact.size"
    (engine / "tokenizer.json").write_text("{}")
    (engine / "extra" / "more.txt").write_text("")
    assert kind_of(engine) == "artifact.stray_file"
    (engine / "extra" / "more.txt").unlink()
    (engine / "hidden").mkdir()
    assert kind_of(engine) == "artifact.stray_file"
    (engine / "hidden").rmdir()
    open_artifact(engine)


def test_a_flipped_byte_is_named(engine: Path) -> None:
    data = bytearray((engine / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (engine / "model.onnx.data").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data") as caught:
        open_artifact(engine)
    assert caught.value.kind == "artifact.digest"


@pytest.mark.parametrize("name", ["model.onnx.data", "manifest.json", "extra"])
def test_links_are_refused_wherever_they_stand(engine: Path, tmp_path: Path, name: str) -> None:
    (engine / name).rename(tmp_path / "aside")
    (engine / name).symlink_to(tmp_path / "aside")
    assert kind_of(engine) == "artifact.symlink"


def test_stray_links_are_refused_as_links(engine: Path) -> None:
    (engine / "more").symlink_to("/")
    assert kind_of(engine) == "artifact.symlink"


def test_the_artifact_itself_may_be_reached_through_a_link(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(engine)
    open_artifact(tmp_path / "current")


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json", "stray"])
def test_special_files_are_refused_without_opening_them(engine: Path, name: str) -> None:
    (engine / name).unlink(missing_ok=True)
    os.mkfifo(engine / name)
    assert kind_of(engine) == "artifact.special_file"


def test_sockets_are_refused(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(engine)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        assert kind_of(engine) == "artifact.special_file"


def test_a_directory_in_place_of_a_file(engine: Path) -> None:
    (engine / "tokenizer.json").unlink()
    (engine / "tokenizer.json").mkdir()
    assert kind_of(engine) == "artifact.stray_file"


def test_too_many_files(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MAX_ENTRIES", 3)
    assert kind_of(engine) == "artifact.stray_file"


def test_another_target_or_host(engine: Path) -> None:
    reseal(engine, target="abacus")
    assert kind_of(engine) == "artifact.target"
    reseal(engine, triple="vax-vms")
    assert kind_of(engine) == "artifact.host"
    assert open_artifact(engine, host=False).manifest.triple == "vax-vms"
    reseal(engine, requirements={"cpu_features": ["time_travel"]})
    assert kind_of(engine) == "artifact.host"


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../outside",
        "extra/../../outside",
        "a\\b",
        "",
        "missing.data",
        "manifest.json",
        "./model.onnx.data",
    ],
)
def test_external_data_outside_the_engine(engine: Path, location: str) -> None:
    (engine / "model.onnx").write_bytes(onnx_model(external_tensor(location)))
    reseal(engine)
    assert kind_of(engine) == "artifact.external_data"


@pytest.mark.parametrize(
    "entries", [{"offset": "-16"}, {"offset": "ten"}, {"length": "257"}, {"offset": "250", "length": "16"}]
)
def test_external_data_beyond_its_file(engine: Path, entries: dict[str, str]) -> None:
    (engine / "model.onnx").write_bytes(onnx_model(external_tensor("model.onnx.data", **entries)))
    reseal(engine)
    assert kind_of(engine) == "artifact.external_data"


def test_external_data_is_relative_to_its_model(engine: Path) -> None:
    (engine / "extra" / "model.onnx").write_bytes(onnx_model(external_tensor("notes.txt")))
    reseal(engine)
    open_artifact(engine)


def test_large_files_are_verified_chunk_by_chunk(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "CHUNK_BYTES", 100)
    reseal(engine)
    entry = next(e for e in open_artifact(engine).manifest.files if e.path == "model.onnx.data")
    assert len(entry.chunks) == 3
    for position in (0, 99, 100, 199, 255):
        data = bytearray((engine / "model.onnx.data").read_bytes())
        data[position] ^= 0x80
        (engine / "model.onnx.data").write_bytes(data)
        with pytest.raises(ArtifactError, match=rf"chunk {position // 100 + 1} of 3"):
            open_artifact(engine)
        data[position] ^= 0x80
        (engine / "model.onnx.data").write_bytes(data)
    open_artifact(engine)


def _damage(data: bytes, dice: random.Random) -> bytes:
    """One flipped bit, a truncation, or bytes appended, removed or exchanged in the middle."""
    position = dice.randrange(len(data))
    match dice.randrange(4):
        case 0:
            return data[:position]
        case 1:
            return data + dice.randbytes(1 + position % 7)
        case 2:
            return data[:position] + data[position + 1 :]
        case _:
            flipped = data[position] ^ (1 << dice.randrange(8))
            return data[:position] + bytes([flipped]) + data[position + 1 :]


def test_no_damage_goes_unnoticed(engine: Path) -> None:
    dice = random.Random(0)
    files = [path for path in sorted(engine.rglob("*")) if path.is_file() and path.stat().st_size]
    for _ in range(600):
        file = dice.choice([*files, engine / "manifest.json"])
        sound = file.read_bytes()
        file.write_bytes(_damage(sound, dice))
        with pytest.raises(ArtifactError):
            open_artifact(engine)
        file.write_bytes(sound)
    open_artifact(engine)


def test_no_damaged_model_that_was_sealed_again_gives_another_error(engine: Path) -> None:
    dice = random.Random(1)
    sound = (engine / "model.onnx").read_bytes()
    outcomes = set()
    for _ in range(400):
        (engine / "model.onnx").write_bytes(_damage(sound, dice))
        reseal(engine)
        try:
            open_artifact(engine)
            outcomes.add("opened")
        except ArtifactError as error:
            outcomes.add(error.kind)
    assert outcomes == {"opened", "artifact.external_data"}


def test_an_artifact_can_be_moved(engine: Path, tmp_path: Path) -> None:
    digest = open_artifact(engine).digest
    shutil.copytree(engine, tmp_path / "copy")
    assert open_artifact(tmp_path / "copy").digest == digest
    assert manifest().total_bytes == 0
