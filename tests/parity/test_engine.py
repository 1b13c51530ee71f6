"""Engines of ONNX Runtime verified: sound ones pass, a fault planted in one canonical layer is found in that layer."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from calibration.insert_precision import apply_recipe
from calibration.presets import preset
from calibration.weight_rows import WeightRows
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import ParityError
from exporter.core.progress import NoProgress
from exporter.parity.engine_run import SingleRow
from exporter.parity.inputs import ParityPlan
from exporter.parity.report import VerifyReport
from exporter.parity.verify import EngineUnderTest, verify_artifact, verify_build
from exporter.passes.pipeline import fuse
from exporter.recipe_numbers import plain_numbers
from exporter.trace.trace import trace
from targets.base import BuildSource, Limits, Runner, built_by
from targets.onnxruntime.target import OnnxRuntimeTarget
from tests.conftest import CheckpointFactory
from tests.parity.faults import FAULTS, Fault, plant

LIMITS = Limits(max_batch=3, max_seq_len=64)
PLAN = ParityPlan(prefill=12, decode=34, single_steps=3, ragged=(10, 6, 3), ragged_steps=2, tail=4)


@dataclass
class Workshop:
    """A checkpoint whose graphs are made once, and engines built from them."""

    checkpoint: Checkpoint
    out: Path

    def __post_init__(self) -> None:
        self.traced = trace(self.checkpoint.config)
        self.fused = fuse(self.traced, self.checkpoint.config, LIMITS.max_seq_len).model

    def build(self, recipe: str, fault: Fault | None = None, limits: Limits = LIMITS) -> EngineUnderTest:
        config, rows = self.checkpoint.config, WeightRows(self.checkpoint)
        model = apply_recipe(self.fused, preset(recipe), config)
        if fault:
            model = plant(model, 1, fault)
        directory = self.out / f"{recipe}-{fault is None}-{limits.max_batch}-{len(list(self.out.iterdir()))}"
        directory.mkdir()
        target = OnnxRuntimeTarget()
        source = BuildSource(config, preset(recipe), model, self.checkpoint, rows, limits)
        target.build(source, directory, NoProgress())
        return EngineUnderTest(target, directory, self.checkpoint, preset(recipe), limits, threads=1, plan=PLAN)


@pytest.fixture(scope="module")
def workshop(tiny_checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    # Widths and scale of a model near initialisation: the tiny default's large weights lose too much to four bits.
    path = tiny_checkpoint(
        "gqa", num_hidden_layers=3, rms_norm_eps=1e-5, hidden_size=128, intermediate_size=256, gain=0.5
    )
    return Workshop(Checkpoint.open(path), tmp_path_factory.mktemp("engines"))


def prove(engine: EngineUnderTest) -> VerifyReport:
    return verify_artifact(engine, NoProgress(), plain_numbers(engine.checkpoint))


def values(report: VerifyReport) -> dict[str, float | None]:
    return {check.name: check.value for check in report.checks}


CONTRACT = {
    "relative_l2_error",
    "kl_divergence_mean",
    "kl_divergence_max",
    "perplexity_ratio",
    "top1_agreement",
    "decode_vs_prefill",
    "ragged_batch_vs_single",
    "long_position",
}


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "fp16", "int8-weight", "int4-rtn"])
def test_sound_engine_passes(recipe: str, workshop: Workshop) -> None:
    report = prove(workshop.build(recipe))
    assert report.passed, report.describe()
    assert values(report).keys() >= CONTRACT
    assert report.proof.engine_run is report.proof.simulation is True
    assert report.proof.graph_parity is None
    report.require_passed()


def test_whole_build(workshop: Workshop) -> None:
    engine = workshop.build("int4-rtn")
    quantized = apply_recipe(workshop.fused, engine.recipe, workshop.checkpoint.config)
    rows = plain_numbers(workshop.checkpoint)
    report = verify_build(engine, workshop.traced, workshop.fused, quantized, rows, NoProgress())
    assert report.proof.graph_parity is True
    assert [stage.stage for stage in report.stages] == ["trace", "fuse", "quantize", "compile"]
    assert report.positions > 34


# Faults smaller than the rounding of activations to int8 are for the graphs' check, which is held to fp32 rounding.
ENGINE_FAULTS = [
    *(
        ("fp32", name)
        for name in ("attention_scale", "rms_norm_epsilon", "wrong_weight_source", "gate_up_weights_swapped")
    ),
    *(("int4-rtn", name) for name in ("wrong_weight_source", "gate_up_weights_swapped")),
]


@pytest.mark.parametrize(("recipe", "name"), ENGINE_FAULTS)
def test_fault_in_the_engine_is_found_in_its_layer(recipe: str, name: str, workshop: Workshop) -> None:
    report = prove(workshop.build(recipe, FAULTS[name]))
    assert not report.passed
    assert report.first_divergence is not None
    assert (report.first_divergence.stage, report.first_divergence.layer) == ("compile", 1)
    with pytest.raises(ParityError) as caught:
        report.require_passed()
    assert caught.value.exit_code == 4
    assert caught.value.report["passed"] is False
    assert caught.value.verification is report


def test_failed_stage_ends_the_verification(workshop: Workshop) -> None:
    engine = workshop.build("fp32")
    damaged = plant(workshop.fused, 2, FAULTS["swish_is_relu"])
    rows = plain_numbers(workshop.checkpoint)
    with pytest.raises(ParityError) as caught:
        verify_build(engine, workshop.traced, damaged, damaged, rows, NoProgress())
    report = caught.value.report
    proof = report["proof"]
    assert proof["graph_parity"] is False and proof["built_by"] == built_by(engine.target)
    assert proof["engine_run"] is proof["simulation"] is proof["stand_in"] is None
    assert "not run" in proof["statement"]
    assert report["first_divergence"]["layer"] == 2  # type: ignore[index]


def test_engine_of_one_row_has_no_ragged_batch(workshop: Workshop) -> None:
    report = prove(workshop.build("fp32", limits=Limits(1, 64)))
    assert report.passed
    assert values(report)["ragged_batch_vs_single"] is None


def test_an_engine_for_another_machine_is_proven_by_its_graphs_alone(workshop: Workshop) -> None:
    engine = replace(workshop.build("int4-rtn"), directory=Path("nothing-is-opened"))
    quantized = apply_recipe(workshop.fused, engine.recipe, workshop.checkpoint.config)
    arguments = (engine, workshop.traced, workshop.fused, quantized, plain_numbers(workshop.checkpoint), NoProgress())
    report = verify_build(*arguments, not_run="it is for another one")
    assert not report.passed and report.proof.engine_run is None and report.proof.graph_parity is True
    assert [stage.stage for stage in report.stages] == ["trace", "fuse", "quantize", "simulate"]
    # What it is held to is the simulation, with activations rounded: the quantized graph's figures are others.
    found = {stage.stage: {check.name: check.value for check in stage.checks} for stage in report.stages}
    assert values(report) == found["simulate"] != found["quantize"]
    assert report.facts["engine_not_run"] == "it is for another one" in report.describe()
    assert report.describe().startswith("parity of the graphs passed")
    with pytest.raises(ParityError, match="the engine was not run"):
        report.require_passed()


def test_a_recipe_that_loses_too_much_fails_without_an_engine(workshop: Workshop) -> None:
    engine = workshop.build("fp32")
    damaged = plant(workshop.fused, 2, FAULTS["swish_is_relu"])
    rows = plain_numbers(workshop.checkpoint)
    with pytest.raises(ParityError) as caught:
        verify_build(engine, workshop.traced, damaged, damaged, rows, NoProgress(), not_run="it is for another one")
    assert caught.value.report["first_divergence"]["layer"] == 2  # type: ignore[index]


def test_the_ragged_batch_opens_no_longer_a_cache_than_it_needs(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    opened = EngineUnderTest.open

    def watch(self: EngineUnderTest, batch: int, positions: int, hidden: bool) -> Runner:
        asked.append((batch, positions))
        return opened(self, batch, positions, hidden)

    monkeypatch.setattr(EngineUnderTest, "open", watch)
    assert prove(workshop.build("fp32")).passed
    longest = max(PLAN.ragged) + PLAN.ragged_steps
    assert asked == [(1, LIMITS.max_seq_len), (3, longest), (1, LIMITS.max_seq_len)]


class Forgetful(Runner):
    """A runner whose decode steps are computed as if the last cached position were not there."""

    def __init__(self, inner: Runner) -> None:
        self.inner = inner
        self.truncate = inner.truncate
        self.reset = inner.reset
        self.prefill = inner.prefill
        self.extend = inner.extend

    def __enter__(self) -> "Forgetful":
        self.inner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.inner.__exit__(None, None, None)

    @property
    def hidden(self) -> list[np.ndarray]:  # type: ignore[override]
        return self.inner.hidden

    def decode(self, input_ids: np.ndarray, active: np.ndarray) -> np.ndarray:
        for row in np.flatnonzero(active):
            self.inner.truncate(int(row), int(self.inner.lengths[row]) - 1)
        return self.inner.decode(input_ids, active)


def test_faulty_cache_is_found(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = workshop.build("fp32")
    opened = EngineUnderTest.open
    monkeypatch.setattr(EngineUnderTest, "open", lambda *arguments: Forgetful(opened(*arguments)))
    report = prove(engine)
    checks = {check.name: check for check in report.checks}
    assert not checks["decode_vs_prefill"].passed
    assert checks["chunked_vs_prefill"].passed


def test_teacher_forcing_follows_the_row(workshop: Workshop) -> None:
    engine = workshop.build("fp32")
    inputs = engine.inputs()
    seen: list[int] = []
    with engine.open(1, LIMITS.max_seq_len, True) as runner:
        row = SingleRow(runner, inputs, lambda hidden: seen.append(hidden[0].shape[1]))
        from exporter.parity.scoring import scored_positions

        logits = row.teacher_forced(scored_positions(inputs)[0])
    assert sum(seen) == inputs.main_length
    assert logits.shape == (inputs.decode + 1, workshop.checkpoint.config.vocab_size)
