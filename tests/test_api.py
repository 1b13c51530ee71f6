"""The Python face: the same power as the command line, as typed functions."""

from collections.abc import Callable
from pathlib import Path

import pytest

import enginesmith

Factory = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Factory) -> Path:
    return tiny_checkpoint("gqa", gain=0.5)


@pytest.fixture(scope="module")
def outcome(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> enginesmith.BuildOutcome:
    out = tmp_path_factory.mktemp("api") / "engine"
    return enginesmith.build(checkpoint, target="onnxruntime", recipe="int8-weight", out=out, max_seq_len=96)


def test_every_public_name_exists() -> None:
    assert [name for name in enginesmith.__all__ if getattr(enginesmith, name, None) is None] == []
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = enginesmith.nonsense


def test_build_returns_what_was_proven(outcome: enginesmith.BuildOutcome) -> None:
    assert outcome.report is not None and outcome.report.passed
    assert outcome.manifest.limits.max_seq_len == 96
    assert outcome.manifest.parity == outcome.report.to_json()
    assert (
        enginesmith.inspect(outcome.path, expect_digest=outcome.digest).manifest.to_json() == outcome.manifest.to_json()
    )


def test_verify_bench_and_compare(outcome: enginesmith.BuildOutcome, checkpoint: Path, tmp_path: Path) -> None:
    report = enginesmith.verify(outcome.path, against=checkpoint, report=tmp_path / "report.html")
    assert report.passed and report.proof.graph_parity is None
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert enginesmith.bench(outcome.path, prompt_tokens=16, new_tokens=8)["decode_tokens_per_s"] > 0
    assert enginesmith.compare([outcome.path], against=checkpoint).engines[0]["recipe"] == "int8-weight"


def test_load_generates_in_batches(outcome: enginesmith.BuildOutcome) -> None:
    with enginesmith.load(outcome.path, batch=2) as engine:
        both = engine.generate_batch([[5, 6, 7], [8, 9]], max_new_tokens=5)
    with enginesmith.load(outcome.path) as engine:
        alone = [engine.generate(prompt, max_new_tokens=5) for prompt in ([5, 6, 7], [8, 9])]
    assert [c.output_ids for c in both] == [c.output_ids for c in alone]


def test_plan_and_lists(checkpoint: Path) -> None:
    plan = enginesmith.plan(checkpoint, target="onnxruntime", recipe="int4-rtn", group_size=64, parity=False)
    assert plan.blocker is None and plan.coverage.fraction == 1.0
    assert "verify" not in [stage.name for stage in plan.stages]
    assert "onnxruntime" in [target["name"] for target in enginesmith.targets()]
    assert "int4-rtn" in [recipe["name"] for recipe in enginesmith.recipes()]
    assert enginesmith.doctor().usable


def test_calibrating_once_for_a_plan(checkpoint: Path, tmp_path: Path) -> None:
    text = Path(__file__).parent / "support" / "tiny.py"
    out = tmp_path / "gptq.qparams"
    with pytest.raises(enginesmith.InputError, match="text"):
        enginesmith.build(checkpoint, target="onnxruntime", recipe="int4-gptq", out=tmp_path / "engine")
    found = enginesmith.calibrate(
        checkpoint, recipe="int4-gptq", calibration=text, calibration_tokens=256, length=64, out=out
    )
    assert found.path == out and found.parameters.recipe.name == "int4-gptq"
    plan = enginesmith.plan(checkpoint, target="onnxruntime", qparams=out)
    assert plan.recipe == "int4-gptq" and {matrix.source for matrix in plan.matrices} == {"stored", "derived"}
    request = enginesmith.CalibrationRequest(text=text, tokens=256)
    within = enginesmith.plan(checkpoint, target="onnxruntime", recipe="int4-gptq", calibration=request)
    assert within.stages[0].name == "calibrate" and not within.matrices
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq.qparams"]


def test_errors_carry_code_kind_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(enginesmith.InputError) as caught:
        enginesmith.build(tmp_path / "none", target="onnxruntime", out=tmp_path / "engine")
    assert (caught.value.exit_code, caught.value.kind) == (2, "checkpoint.missing") and caught.value.remedy
    assert list(tmp_path.iterdir()) == []
