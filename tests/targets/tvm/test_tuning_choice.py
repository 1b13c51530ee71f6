"""Tuning as a build meets it: files, refusals, and a search of a few seconds on a tiny engine."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason="apache-tvm is not installed: no engines can be compiled")

from exporter.core.errors import InputError
from exporter.core.machine import cpu_model, machine
from targets.base import DeviceOptions
from targets.tvm.devices import resolve_device
from targets.tvm.tuning import Tuning, TuningFile, read_tuning, shape_key
from targets.tvm.tuning_choice import known_results
from tests.targets.tvm.builds import build_tvm, tvm_source
from tests.targets.tvm.step_engine import StepEngine

PROMPT = {0: np.arange(3, 43)}
FOREIGN = "raspberry-pi-5" if machine() == "x86_64" else "x86-64-v3"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results of this machine that hold nothing yet."""
    path = tmp_path / "results.json"
    TuningFile(resolve_device(DeviceOptions()).isa.name, cpu_model()).write(path)
    return path


def test_an_engine_is_built_with_what_a_file_holds(tiny_checkpoint, tmp_path: Path, results: Path) -> None:
    plain = tvm_source(tiny_checkpoint("gqa"), "int4", "fp16")
    found, key = Tuning(prefetch=2048, tile_rows=3, chunk=64, queries=24), shape_key(plain.config, plain.recipe)
    read_tuning(results).with_result(key, found).write(results)
    engines = [
        build_tvm(source, tmp_path / name)
        for name, source in (("plain", plain), ("tuned", replace(plain, device=DeviceOptions(tuning=results))))
    ]
    assert read_tuning(tmp_path / "tuned" / "tuning.json").found == {key: found}
    assert "tuning.json" in engines[1].result.files
    assert json.loads((tmp_path / "tuned" / "engine.json").read_text())["chunk"] == 64
    assert not (tmp_path / "plain" / "tuning.json").exists()
    logits = [StepEngine(tmp_path / name, 1, 64).step(PROMPT)[0] for name in ("plain", "tuned")]
    np.testing.assert_array_equal(*logits)


def test_a_search_extends_the_file(tiny_checkpoint, tmp_path: Path, results: Path) -> None:
    kept = read_tuning(results).with_result("another model", Tuning(prefetch=0))
    kept.write(results)
    options = DeviceOptions(tune_minutes=0.01, tuning=results)
    source = replace(tvm_source(tiny_checkpoint("gqa"), "int4", "fp16"), device=options)
    build_tvm(source, tmp_path / "engine")
    after, key = read_tuning(results), shape_key(source.config, source.recipe)
    assert set(after.found) == {"another model", key}
    assert after.found["another model"] == Tuning(prefetch=0)
    assert read_tuning(tmp_path / "engine" / "tuning.json").found == {key: after.found[key]}


def test_a_model_that_was_not_tuned_is_refused(tiny_checkpoint, tmp_path: Path, results: Path) -> None:
    source = replace(tvm_source(tiny_checkpoint("gqa"), "int4"), device=DeviceOptions(tuning=results))
    with pytest.raises(InputError, match="64x128, 4/2 heads of 16, int4/g32, fp32 cache") as error:
        build_tvm(source, tmp_path / "engine")
    assert error.value.kind == "tuning.shape"


@pytest.mark.parametrize("path", ["none/results.json", "."])
def test_results_that_could_not_be_kept_are_refused_before_the_search(tmp_path: Path, path: str) -> None:
    options = DeviceOptions(tune_minutes=60, tuning=tmp_path / path)
    with pytest.raises(InputError, match="no file can be written") as error:
        known_results(options, resolve_device(options))
    assert error.value.kind == "tuning.unwritable"


def test_another_machine_cannot_be_tuned_here() -> None:
    options = DeviceOptions(device=FOREIGN, tune_minutes=1)
    with pytest.raises(InputError, match=FOREIGN) as error:
        known_results(options, resolve_device(options))
    assert error.value.kind == "tuning.foreign"


def test_results_of_another_machine_serve_builds_for_it(tmp_path: Path) -> None:
    options = DeviceOptions(device=FOREIGN, tuning=tmp_path / "board.json")
    device = resolve_device(options)
    kept = TuningFile(device.isa.name, "the board's CPU")
    kept.write(tmp_path / "board.json")
    assert known_results(options, device) == kept


def test_results_of_another_cpu_are_refused(tmp_path: Path) -> None:
    options = DeviceOptions(tuning=tmp_path / "other.json")
    device = resolve_device(options)
    TuningFile(device.isa.name, "another CPU").write(tmp_path / "other.json")
    with pytest.raises(InputError, match="another CPU") as error:
        known_results(options, device)
    assert error.value.kind == "tuning.cpu"


def test_a_file_to_be_written_need_not_exist(tmp_path: Path) -> None:
    options = DeviceOptions(tune_minutes=1, tuning=tmp_path / "new.json")
    assert known_results(options, resolve_device(options)).found == {}
    with pytest.raises(InputError, match="No such file"):
        known_results(replace(options, tune_minutes=0.0), resolve_device(options))
