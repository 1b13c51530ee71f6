"""File digests against hashlib on whole files."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from exporter.artifact import digests
from exporter.artifact.digests import CHUNK_BYTES, damaged_files, hash_files


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 200, 1234])
def test_digests_are_those_of_sha256sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(digests, "CHUNK_BYTES", 100)
    monkeypatch.setattr(digests, "BLOCK_BYTES", 33)
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "f").write_bytes(data)
    (entry,) = hash_files(tmp_path, ["f"])
    assert (entry.path, entry.bytes, entry.sha256) == ("f", size, hashlib.sha256(data).hexdigest())
    pieces = [data[i : i + 100] for i in range(0, size, 100)] if size > 100 else []
    assert list(entry.chunks) == [hashlib.sha256(piece).hexdigest() for piece in pieces]
    assert len(entry.chunks) == entry.expected_chunks
    assert damaged_files(tmp_path, (entry,)) == []


def test_a_file_above_one_real_chunk(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(CHUNK_BYTES + 1)
    (entry,) = hash_files(tmp_path, ["f"])
    assert entry.chunks == (hashlib.sha256(bytes(CHUNK_BYTES)).hexdigest(), hashlib.sha256(b"\0").hexdigest())


def test_a_file_that_shrinks_while_it_is_read_counts_as_damaged(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    entries = hash_files(tmp_path, ["f"])
    (tmp_path / "f").write_bytes(b"123")
    assert damaged_files(tmp_path, entries) == ["f"]
