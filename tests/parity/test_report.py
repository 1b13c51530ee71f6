"""The `verify` JSON of the contract."""

import json
import math

import pytest

from exporter.core.errors import ParityError
from exporter.parity.limits import within
from exporter.parity.report import Check, Divergence, Proof, StageResult, VerifyReport

PASSING = (Check("kl_divergence_mean", 0.004, 0.05), Check("top1_agreement", 0.9))
RUN = Proof(True, "onnxruntime 1.31.1", True, True)


def make(checks: tuple[Check, ...] = PASSING, proof: Proof = RUN, **more: object) -> VerifyReport:
    return VerifyReport("onnxruntime", "int4-rtn", 11.2, 11.4, checks, proof, **more)  # type: ignore[arg-type]


def test_contract() -> None:
    data = make().to_json()
    assert data["passed"] is True
    assert data["checks"][0] == {
        "name": "kl_divergence_mean",
        "value": 0.004,
        "limit": 0.05,
        "passed": True,
        "stage": "compile",
    }
    assert data["first_divergence"] is None
    proof = {"graph_parity": True, "built_by": "onnxruntime 1.31.1", "engine_run": True, "simulation": True}
    assert data["proof"] == {**proof, "stand_in": None, "statement": ""}
    assert data["perplexity_reference"] == 11.2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_fails_and_stays_valid_json(bad: float) -> None:
    report = make((Check("kl_divergence_mean", bad, 0.05), Check("top1_agreement", bad)))
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["passed"] is False
    assert [check["value"] for check in data["checks"]] == [None, None]
    assert not any(check["passed"] for check in data["checks"])
    assert not within(bad, None)


@pytest.mark.parametrize(
    ("proof", "passed"),
    [
        (Proof(None, "x", True), True),
        (Proof(True, "x", None), False),
        (Proof(True, "x", False), False),
        (Proof(False, "x", True), False),
    ],
)
def test_what_was_not_run_never_counts_as_passed(proof: Proof, passed: bool) -> None:
    assert make(proof=proof).passed is passed


def test_an_engine_for_another_machine_fails_nothing_and_passes_nothing() -> None:
    report = make(proof=Proof(True, "x", None), facts={"engine_not_run": "it is for aarch64-linux"})
    report.require_passed(engine_run=False)
    assert not report.passed and report.to_json()["passed"] is False
    assert "aarch64-linux" in report.describe()
    failed = make((Check("kl_divergence_mean", 0.4, 0.05),), Proof(True, "x", None))
    with pytest.raises(ParityError):
        failed.require_passed(engine_run=False)


def test_failed_stage_fails_the_whole() -> None:
    found = Divergence("fuse", 3, "RotaryEmbedding", 0.7)
    stage = StageResult("fuse", (Check("local_error", 0.7, 4e-6, "fuse"),), divergence=found)
    report = make(stages=(stage,), first_divergence=found)
    assert not report.passed
    assert report.to_json()["first_divergence"]["layer"] == 3
    with pytest.raises(ParityError, match="layer 3, operator RotaryEmbedding") as caught:
        report.require_passed()
    assert "local_error 0.7" in str(caught.value)
    assert "local_error" in report.describe()


def test_passing_report_describes_its_figures() -> None:
    text = make().describe()
    assert text.startswith("parity passed")
    assert "0.004" in text
