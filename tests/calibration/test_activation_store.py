"""Activations in memory and in files hold the same values; the budget decides; a full disk is an error in words."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from calibration.activation_store import Activations, ActivationStore, batches
from exporter.core.errors import InputError

SHAPE = (5, 3, 4)
BYTES = 4 * 5 * 3 * 4


def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


@pytest.mark.parametrize("budget", [0, BYTES])
def test_what_was_written_is_read(tmp_path: Path, budget: int) -> None:
    store = ActivationStore(tmp_path, budget)
    made, expected = store.make(SHAPE), values()
    for start, stop in batches(5, 2):
        made.write(start, expected[start:stop])
    np.testing.assert_array_equal(made.read(0, 5), expected)
    np.testing.assert_array_equal(made.read(3, 5), expected[3:])
    made.write(1, expected[:1])
    np.testing.assert_array_equal(made.read(1, 3), expected[[0, 2]])
    assert len(list(tmp_path.iterdir())) == (budget == 0)
    store.drop(made)
    assert not list(tmp_path.iterdir())


def test_the_budget_counts_what_exists(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, 2 * BYTES)
    first, second, third = (store.make(SHAPE) for _ in range(3))
    assert [each.path is None for each in (first, second, third)] == [True, True, False]
    store.drop(first)
    assert store.make(SHAPE).path is None
    assert second.nbytes == BYTES


@pytest.mark.parametrize("budget", [0, BYTES])
def test_saved_activations_are_opened_again(tmp_path: Path, budget: int) -> None:
    store = ActivationStore(tmp_path, budget)
    made = store.make(SHAPE)
    made.write(0, values())
    made.save(tmp_path / "kept.f32", 2)
    np.testing.assert_array_equal(made.read(0, 5), values())
    assert [file.name for file in tmp_path.iterdir()] == ["kept.f32"]
    np.testing.assert_array_equal(store.open(tmp_path / "kept.f32", SHAPE).read(0, 5), values())
    assert (tmp_path / "kept.f32").read_bytes() == values().astype("<f4").tobytes()


def test_a_saved_file_of_another_size_is_refused(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, 0)
    (tmp_path / "kept.f32").write_bytes(bytes(BYTES - 1))
    for name in ("kept.f32", "missing.f32"):
        with pytest.raises(InputError) as refusal:
            store.open(tmp_path / name, SHAPE)
        assert refusal.value.kind == "work_dir.damaged"


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, "work_dir.full"), (errno.EIO, "work_dir.write")])
def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: str) -> None:
    made = Activations(SHAPE, tmp_path / "a.f32")

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(InputError) as refusal:
        made.write(0, values())
    assert refusal.value.kind == kind


def test_short_writes_and_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Activations(SHAPE, tmp_path / "a.f32")
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda file, parts, at: write(file, [parts[0][:7]], at))
    monkeypatch.setattr(os, "preadv", lambda file, parts, at: read(file, [parts[0][:5]], at))
    made.write(0, values())
    np.testing.assert_array_equal(made.read(0, 5), values())
