"""What is carried to a GPU machine: packed and unpacked here, and the commands that fetch it."""

import random
from pathlib import Path

import pytest

from tests.gpu.pack import pack, pip_commands
from tests.gpu.unpack import unpack


@pytest.fixture
def site(tmp_path) -> Path:
    """Two packages; bytes that do not compress, so that there are several parts."""
    folder = tmp_path / "site"
    for name, content in {"a/__init__.py": b"x = 1\n", "a/b/lib.so.1": random.Random(0).randbytes(9000)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "a" / "__pycache__").mkdir()
    (folder / "a" / "__pycache__" / "left.pyc").touch()
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_comes_out_as_it_went_in(site, tmp_path):
    parts = pack(site, tmp_path / "pack", 6000)
    assert [part.parent.name for part in parts] == ["1", "2"] and max(p.stat().st_size for p in parts) <= 6000
    assert unpack(tmp_path / "pack", tmp_path / "out") == f"2 parts unpacked into {tmp_path / 'out'}"
    found = content(tmp_path / "out")
    assert found.pop(".unpacked") == b""
    assert found == {name: data for name, data in content(site).items() if "__pycache__" not in name}
    assert "already" in unpack(tmp_path / "pack", tmp_path / "out")


def test_the_same_packages_make_the_same_parts(site, tmp_path):
    first, second = (pack(site, tmp_path / name) for name in ("one", "two"))
    assert [part.read_bytes() for part in first] == [part.read_bytes() for part in second]


def test_a_missing_part_is_named(site, tmp_path):
    parts = pack(site, tmp_path / "pack", 6000)
    parts[0].unlink()
    with pytest.raises(FileNotFoundError, match="part 1 of 2"):
        unpack(tmp_path / "pack", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="any part"):
        unpack(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_than_two_goes_are_refused(site, tmp_path):
    with pytest.raises(ValueError, match="do not fit into 2 parts of 1000"):
        pack(site, tmp_path / "pack", 1000)


def test_compiled_packages_are_for_the_other_machines_python():
    foreign, plain = pip_commands(Path("site"), "1.7.1.116", "3.12")
    assert foreign[foreign.index("--python-version") + 1] == "3.12" and "--only-binary=:all:" in foreign
    assert "tensorrt_rtx_cu13_libs==1.7.1.116" in foreign and "tensorrt_rtx==1.7.1.116" in plain
    assert "--python-version" not in plain
