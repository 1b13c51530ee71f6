"""The output directory appears complete or not at all."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.artifact import rename
from exporter.artifact.staging import check_output, staged_directory
from exporter.core import temporary_directory
from exporter.core.errors import InputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_artifact(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "manifest.json").write_text(text)
    return path


def kind_of(final: Path, force: bool = False, source: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        check_output(final, force, source)
    assert caught.value.message and caught.value.remedy
    return caught.value.kind


def test_nothing_is_visible_until_the_end(tmp_path: Path) -> None:
    final = tmp_path / "engine"
    with staged_directory(final) as work:
        (work / "sub").mkdir()
        (work / "sub" / "a").write_text("a")
        assert not final.exists() and work.parent == tmp_path
    assert names(tmp_path) == ["engine"] and (final / "sub" / "a").read_text() == "a"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged_directory(tmp_path / "engine") as work:
        (work / "a").write_text("a")
        raise error
    assert names(tmp_path) == []


def test_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    final = make_artifact(tmp_path / "engine", "old")
    with pytest.raises(InputError) as caught, staged_directory(final):
        pytest.fail("work began")
    assert caught.value.kind == "output.exists" and names(tmp_path) == ["engine"]


def test_force_replaces_only_at_the_end(tmp_path: Path) -> None:
    final = make_artifact(tmp_path / "engine", "old")
    with staged_directory(final, force=True) as work:
        (work / "manifest.json").write_text("new")
        assert (final / "manifest.json").read_text() == "old"
    assert (final / "manifest.json").read_text() == "new" and names(tmp_path) == ["engine"]


def test_force_keeps_the_old_artifact_when_the_build_fails(tmp_path: Path) -> None:
    final = make_artifact(tmp_path / "engine", "old")
    with pytest.raises(RuntimeError), staged_directory(final, force=True):
        raise RuntimeError
    assert (final / "manifest.json").read_text() == "old" and names(tmp_path) == ["engine"]


def test_force_does_not_replace_what_is_no_artifact(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with staged_directory(home, force=True) as work:
        (work / "manifest.json").write_text("new")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    assert kind_of(tmp_path / "photos", force=True) == "output.not_artifact"
    assert (home / "manifest.json").exists()


def test_bad_outputs_have_stable_kinds(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    checkpoint = tmp_path / "models" / "llama"
    checkpoint.mkdir(parents=True)
    assert kind_of(tmp_path / "file") == "output.not_directory"
    assert kind_of(tmp_path / "file", force=True) == "output.not_directory"
    assert kind_of(tmp_path / "link") == "output.symlink"
    assert kind_of(tmp_path / "file" / "deep" / "engine") == "output.parent"
    assert kind_of(tmp_path / "file" / "engine") == "output.parent"
    assert kind_of(checkpoint, force=True, source=checkpoint) == "output.checkpoint"
    assert kind_of(tmp_path / "models", force=True, source=checkpoint) == "output.checkpoint"
    assert kind_of(Path("/")) in ("output.root", "output.exists")
    assert kind_of(checkpoint / "engine", source=checkpoint) == "output.checkpoint"
    assert kind_of(checkpoint / "engines" / "int4", source=checkpoint) == "output.checkpoint"
    check_output(tmp_path / "models" / "engine", False, checkpoint)


def test_unwritable_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert kind_of(tmp_path / "engine") == "output.unwritable"


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError) as caught, staged_directory(tmp_path / "engine"):
        pytest.fail("work began")
    assert caught.value.kind == "output.unwritable"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError) as caught,
        staged_directory(tmp_path / "engine"),
        Path("/dev/full").open("wb") as full,
    ):
        full.write(b"x")
    assert caught.value.kind == "output.full" and names(tmp_path) == []


def test_other_os_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_directory(tmp_path / "engine"):
        (tmp_path / "missing").read_text()


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    final = tmp_path / "engine"
    with pytest.raises(InputError) as caught, staged_directory(final):
        make_artifact(final, "other")
    assert caught.value.kind == "output.exists"
    assert (final / "manifest.json").read_text() == "other" and names(tmp_path) == ["engine"]


BUILDER = """
import sys, time
from pathlib import Path
from exporter.artifact.staging import staged_directory
with staged_directory(Path(sys.argv[1])) as work:
    (work / "weights").write_bytes(b"x" * 1000)
    print("ready", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_build_left_is_removed_by_the_next_and_a_living_one_is_spared(tmp_path: Path) -> None:
    final = tmp_path / "engine"
    command = [sys.executable, "-c", BUILDER, str(final)]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) for _ in range(2)]
    for builder in builders:
        assert builder.stdout is not None and builder.stdout.readline() == b"ready\n"
    try:
        builders[0].send_signal(signal.SIGKILL)
        builders[0].wait()
        assert len(names(tmp_path)) == 2
        with staged_directory(final) as work:
            (work / "a").write_text("a")
        left = names(tmp_path)
        assert len(left) == 2 and f"-{builders[1].pid}-" in left[0] and left[1] == "engine"
    finally:
        builders[1].kill()
        builders[1].wait()
        for builder in builders:
            assert builder.stdout is not None
            builder.stdout.close()


def test_a_build_removes_what_a_killed_calibration_left(tmp_path: Path) -> None:
    (tmp_path / ".engine.calibration-1-abc" / "deep").mkdir(parents=True)
    with staged_directory(tmp_path / "engine"):
        pass
    assert names(tmp_path) == ["engine"]


def test_similar_names_are_not_taken_for_leftovers(tmp_path: Path) -> None:
    other = tmp_path / ".engine2.building-1-abc"
    other.mkdir()
    (tmp_path / ".engine.building-note").write_text("a file")
    with staged_directory(tmp_path / "engine"):
        pass
    assert names(tmp_path) == [".engine.building-note", ".engine2.building-1-abc", "engine"]


def test_without_locks_the_process_id_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary_directory, "_lock", lambda _: None)
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".engine.building-{dead.pid}-0").mkdir()
    (tmp_path / f".engine.building-{os.getpid()}-0").mkdir()
    with staged_directory(tmp_path / "engine"):
        pass
    assert names(tmp_path) == [f".engine.building-{os.getpid()}-0", "engine"]


def test_exchange_in_steps_restores_on_failure(tmp_path: Path) -> None:
    old = make_artifact(tmp_path / "engine", "old")
    new = make_artifact(tmp_path / "new", "new")
    rename.exchange_in_steps(new, old)
    assert (old / "manifest.json").read_text() == "new" and (new / "manifest.json").read_text() == "old"
    with pytest.raises(FileNotFoundError):
        rename.exchange_in_steps(tmp_path / "missing", old)
    assert (old / "manifest.json").read_text() == "new" and names(tmp_path) == ["engine", "new"]


def test_renames_without_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rename, "_renameat2", lambda *_: False)
    final = tmp_path / "engine"
    for text in ("old", "new"):
        with staged_directory(final, force=True) as work:
            (work / "manifest.json").write_text(text)
        assert (final / "manifest.json").read_text() == text and names(tmp_path) == ["engine"]


def test_a_kill_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    aside = make_artifact(tmp_path / f".engine.replaced-{dead.pid}-abc", "old")
    with pytest.raises(InputError) as caught, staged_directory(tmp_path / "engine"):
        pytest.fail("work began")
    assert caught.value.kind == "output.exists" and not aside.exists()
    assert (tmp_path / "engine" / "manifest.json").read_text() == "old"


def test_a_broken_link_as_output(tmp_path: Path) -> None:
    (tmp_path / "engine").symlink_to(tmp_path / "gone")
    assert kind_of(tmp_path / "engine") == "output.symlink"


def test_missing_parents_are_made_and_go_with_a_failure(tmp_path: Path) -> None:
    final = tmp_path / "new" / "deep" / "engine"
    with pytest.raises(RuntimeError), staged_directory(final):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with staged_directory(final) as work:
        (work / "file").write_bytes(b"x")
    assert (final / "file").read_bytes() == b"x"
