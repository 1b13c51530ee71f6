"""Directories beside an output, and what is left of those whose process was killed."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from exporter.core import temporary_directory
from exporter.core.temporary_directory import create, remove_abandoned

HOLDER = """
import sys, time
from pathlib import Path
from exporter.core.temporary_directory import create
print(create(Path(sys.argv[1]), "working").path, flush=True)
time.sleep(600)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def holder(final: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A process that holds a directory beside `final`."""
    command = [sys.executable, "-c", HOLDER, str(final)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True) as process:
        try:
            assert process.stdout is not None
            path = Path(process.stdout.readline().strip())
            (path / "activations").write_bytes(b"x" * 1000)
            yield process, path
        finally:
            process.kill()


def test_it_is_private_and_goes_with_its_content(tmp_path: Path) -> None:
    made = create(tmp_path / "engine", "working")
    assert made.path.parent == tmp_path and made.path.name.startswith(f".engine.working-{os.getpid()}-")
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    (made.path / "deep").mkdir()
    (made.path / "deep" / "file").write_text("x")
    made.remove()
    assert names(tmp_path) == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(made.descriptor)


def test_a_killed_process_leaves_it_to_the_next_and_a_living_one_keeps_it(tmp_path: Path) -> None:
    final = tmp_path / "engine"
    with holder(final) as (killed, left), holder(final) as (_, kept):
        killed.kill()
        killed.wait()
        assert left.exists()
        made = create(final, "working")
        assert not left.exists() and (kept / "activations").exists()
        made.remove()
        assert names(tmp_path) == [kept.name]


def test_ones_own_are_alive(tmp_path: Path) -> None:
    first, second = create(tmp_path / "engine", "working"), create(tmp_path / "engine", "working")
    assert names(tmp_path) == sorted([first.path.name, second.path.name])
    first.remove()
    second.remove()


def test_names_that_look_alike_are_left_alone(tmp_path: Path) -> None:
    others = [
        ".engine.working-note",
        ".engine.working-1",
        ".engine.working-1-notes",
        ".engine.working-1-abc.d",
        ".engine.working-x-abc",
        ".engine.building-1-abc",
        ".engine2.working-1-abc",
        "engine.working-1-abc",
        ".engine.abcdefgh",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".engine.working-1-abc").write_text("a file")
    target = tmp_path / "elsewhere"
    (target / "photos").mkdir(parents=True)
    (tmp_path / ".engine.working-1-def").symlink_to(target)
    before = names(tmp_path)
    create(tmp_path / "engine", "working").remove()
    assert names(tmp_path) == before and names(target) == ["photos"]


def test_each_purpose_is_cleared_by_name(tmp_path: Path) -> None:
    for purpose in ("working", "building"):
        (tmp_path / f".engine.{purpose}-1-abc").mkdir()
    remove_abandoned(tmp_path / "engine", "working")
    assert names(tmp_path) == [".engine.building-1-abc"]
    remove_abandoned(tmp_path / "engine", "working", "building")
    assert names(tmp_path) == []


def test_a_relative_path_and_a_linked_folder_are_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(real)
    for final in (Path("engine"), tmp_path / "link" / "engine"):
        (real / ".engine.working-1-abc").mkdir()
        made = create(final, "working")
        assert made.path.parent == real and names(real) == [made.path.name]
        made.remove()


def test_without_locks_the_process_id_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary_directory, "_lock", lambda _: None)
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    (tmp_path / f".engine.working-{dead.pid}-0").mkdir()
    (tmp_path / f".engine.working-{os.getpid()}-0").mkdir()
    create(tmp_path / "engine", "working").remove()
    assert names(tmp_path) == [f".engine.working-{os.getpid()}-0"]
