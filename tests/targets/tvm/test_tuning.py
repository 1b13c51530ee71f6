import json
from pathlib import Path

import pytest

from exporter.core.errors import InputError
from targets.tvm.tuning import DEFAULT, Tuning, TuningFile, read_tuning


@pytest.mark.parametrize(
    "values",
    [
        {"prefetch": 100},
        {"prefetch": -64},
        {"tile_rows": 9},
        {"chunk": 0},
        {"chunk": 544},
        {"queries": 8},
        {"chunk": 64.0},
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(values))) as error:
        Tuning(**values)
    assert error.value.kind == "tuning.value"


def test_results_survive_the_file(tmp_path: Path) -> None:
    found = TuningFile("x86-64-v3", "Some CPU").with_result("a shape", Tuning(prefetch=4096)).with_result("b", DEFAULT)
    found.write(tmp_path / "tuning.json")
    assert read_tuning(tmp_path / "tuning.json") == found


def test_a_file_belongs_to_a_profile_and_a_cpu() -> None:
    found = TuningFile("x86-64-v3", "Some CPU")
    found.check("x86-64-v3", "Some CPU")
    found.check("x86-64-v3", None)
    with pytest.raises(InputError, match=r"x86-64-v3.*x86-64-v2") as error:
        found.check("x86-64-v2", "Some CPU")
    assert error.value.kind == "tuning.profile"
    with pytest.raises(InputError, match=r"Some CPU.*Other CPU") as error:
        found.check("x86-64-v3", "Other CPU")
    assert error.value.kind == "tuning.cpu"


GOOD = {"format": 1, "profile": "x86-64-v3", "cpu": "c", "found": {"k": {**vars(DEFAULT)}}}


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {**GOOD, "format": 2},
        {**GOOD, "cpu": 3},
        {**GOOD, "found": []},
        {**GOOD, "found": {"k": {}}},
        {**GOOD, "found": {"k": {**vars(DEFAULT), "lanes": 8}}},
    ],
)
def test_what_is_no_tuning_file_is_refused(tmp_path: Path, data: object) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="holds no tuning results") as error:
        read_tuning(path)
    assert error.value.kind == "tuning.file"


def test_an_unfinished_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kept = tmp_path / "tuning.json", TuningFile("x86-64-v3", "Some CPU")
    kept.write(path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept.with_result("a shape", DEFAULT).write(path)
    assert read_tuning(path) == kept
    assert [each.name for each in tmp_path.iterdir()] == ["tuning.json"]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_tuning(tmp_path / "none.json")
