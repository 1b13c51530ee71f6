"""Classifiers verified: whole prompts, over the labels' logits; a fault is found where it is."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from calibration.insert_precision import apply_recipe
from calibration.presets import preset
from exporter.core.checkpoint import EMBEDDING, HEAD, Checkpoint
from exporter.core.errors import ParityError
from exporter.core.labelled import labelled
from exporter.core.progress import NoProgress
from exporter.core.task import Task
from exporter.parity.html import render_html
from exporter.parity.inputs import CLASSIFIER_PLAN, ParityPlan, parity_inputs
from exporter.parity.reference import EagerModel
from exporter.parity.report import VerifyReport
from exporter.parity.scoring import expect, scored_positions, targets
from exporter.parity.verify import EngineUnderTest, verify_artifact, verify_build
from exporter.passes.pipeline import fuse
from exporter.recipe_numbers import plain_numbers
from exporter.trace.trace import trace
from targets.base import BuildSource, Limits, Runner
from targets.onnxruntime.target import OnnxRuntimeTarget
from tests.conftest import CheckpointFactory
from tests.parity.faults import FAULTS, Fault, plant

LIMITS = Limits(max_batch=3, max_seq_len=64)
PLAN = ParityPlan(prefill=20, decode=12, single_steps=3, ragged=(20, 11, 5), ragged_steps=2, tail=4, prompts=6)
TASK = Task("classify", ("safe", "unsafe", "unsure"), (7, 300, 44))
WHOLE_PROMPTS = {"decode_vs_prefill", "chunked_vs_prefill", "prefix_reuse"}
OF_TEXT = {"perplexity_ratio", "top1_agreement"}
HELD = {
    *("relative_l2_error", "kl_divergence_mean", "kl_divergence_max", "label_agreement"),
    *("simulation_relative_l2_error", "long_position", "instrumented_vs_plain", "ragged_batch_vs_single"),
}


@dataclass
class Workshop:
    """A checkpoint seen by its labels, whose graphs are made once, and engines built from them."""

    checkpoint: Checkpoint
    out: Path

    def __post_init__(self) -> None:
        self.traced = trace(self.checkpoint.config)
        self.fused = fuse(self.traced, self.checkpoint.config, LIMITS.max_seq_len).model
        self.numbers = plain_numbers(self.checkpoint, 1)

    def build(
        self, recipe: str, fault: Fault | None = None, limits: Limits = LIMITS, weights: Checkpoint | None = None
    ) -> EngineUnderTest:
        """`weights`: those that the engine gets in place of the right ones."""
        config, target = self.checkpoint.config, OnnxRuntimeTarget()
        given = weights or self.checkpoint
        model = apply_recipe(self.fused, preset(recipe), config)
        model = plant(model, 1, fault) if fault else model
        directory = self.out / f"{recipe}-{len(list(self.out.iterdir()))}"
        directory.mkdir()
        source = BuildSource(config, preset(recipe), model, given, plain_numbers(given, 1).rows, limits)
        target.build(source, directory, NoProgress())
        return EngineUnderTest(target, directory, self.checkpoint, preset(recipe), limits, threads=1, plan=PLAN)

    def verify(self, engine: EngineUnderTest, not_run: str = "") -> VerifyReport:
        quantized = apply_recipe(self.fused, engine.recipe, self.checkpoint.config)
        return verify_build(engine, self.traced, self.fused, quantized, self.numbers, NoProgress(), not_run)


@pytest.fixture(scope="module", params=["tied", "biases"])
def workshop(
    request: pytest.FixtureRequest, tiny_checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> Workshop:
    path = tiny_checkpoint(request.param, rms_norm_eps=1e-5, hidden_size=128, intermediate_size=256, gain=0.5)
    return Workshop(labelled(Checkpoint.open(path), TASK), tmp_path_factory.mktemp("classifiers"))


def by_name(report: VerifyReport) -> dict[str, float | None]:
    return {check.name: check.value for check in report.checks}


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "int8-weight", "int4-rtn"])
def test_a_sound_classifier_passes_every_stage(recipe: str, workshop: Workshop) -> None:
    report = workshop.verify(workshop.build(recipe))
    assert report.passed and report.proof.simulation is True, report.describe()
    found = by_name(report)
    assert {name for name, value in found.items() if value is None} == WHOLE_PROMPTS | OF_TEXT
    assert found.keys() >= HELD | WHOLE_PROMPTS | OF_TEXT
    assert all(check.note for check in report.checks if check.value is None)
    assert report.positions == 6 + 3
    stages = {stage.stage: {check.name: check.value for check in stage.checks} for stage in report.stages}
    assert stages["trace"]["label_agreement"] == 1.0 and stages["trace"]["perplexity_ratio"] is None


def test_the_reference_is_transformers_at_the_label_columns(workshop: Workshop) -> None:
    """Prompts of every length that is scored, each through the whole, unmodified model."""
    checkpoint = workshop.checkpoint
    inputs = parity_inputs(checkpoint.path, checkpoint.config, LIMITS.max_seq_len, plan=PLAN)
    model = EagerModel(checkpoint)
    found = model.logits(expect(model, inputs, lambda fraction, detail: None).final)
    whole = LlamaForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, attn_implementation="eager")
    prompts = [inputs.rows[each.row][: end + 1] for each in scored_positions(inputs) for end in each.positions]
    with torch.no_grad():
        logits = [whole(torch.from_numpy(prompt)[None]).logits[0, -1, list(TASK.token_ids)] for prompt in prompts]
    expected = torch.stack(logits).numpy()
    assert found.shape == expected.shape == (6 + 3 + 1, 3)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


class Counting:
    """A runner that notes what is asked of it."""

    def __init__(self, runner: Runner, calls: list[tuple[str, int]]) -> None:
        self._runner, self._calls = runner, calls

    def __enter__(self) -> "Counting":
        self._runner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.__exit__(None, None, None)

    def __getattr__(self, name: str) -> object:
        if name in ("extend", "decode", "truncate"):
            raise AssertionError(f"a classifier's runner was asked for {name}")
        return getattr(self._runner, name)

    def prefill(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self._calls.append((str(ids.shape), int(lengths.max())))
        return self._runner.prefill(ids, lengths)


def test_only_prompts_are_asked_of_the_engine(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners of targets that keep no cache for classifiers can do nothing else."""
    engine, calls = workshop.build("fp32"), list[tuple[str, int]]()
    opened = EngineUnderTest.open
    monkeypatch.setattr(EngineUnderTest, "open", lambda *arguments: Counting(opened(*arguments), calls))
    assert verify_artifact(engine, NoProgress(), workshop.numbers).passed
    lengths = [length for _, length in calls]
    assert max(lengths) == LIMITS.max_seq_len and lengths.count(32) == 2
    assert ("(3, 20)", 20) in calls


@pytest.mark.parametrize("name", ["attention_scale", "rms_norm_epsilon", "wrong_weight_source"])
def test_a_fault_is_found_in_its_layer(name: str, workshop: Workshop) -> None:
    report = verify_artifact(workshop.build("fp32", FAULTS[name]), NoProgress(), workshop.numbers)
    assert not report.passed and report.first_divergence is not None
    assert (report.first_divergence.stage, report.first_divergence.layer) == ("compile", 1)


def test_a_head_of_other_tokens_is_found(workshop: Workshop) -> None:
    """An engine whose labels' rows are those of other tokens, held to the right ones."""
    other = labelled(Checkpoint.open(workshop.checkpoint.path), Task("classify", TASK.labels, (300, 7, 44)))
    report = verify_artifact(workshop.build("fp32", weights=other), NoProgress(), workshop.numbers)
    assert report.first_divergence is not None and report.first_divergence.part == "head"
    with pytest.raises(ParityError):
        report.require_passed()


def test_an_engine_that_cannot_run_here_is_simulated(workshop: Workshop) -> None:
    report = workshop.verify(workshop.build("int4-rtn"), "it is for another machine")
    assert report.nothing_failed and not report.passed and report.stages[-1].stage == "simulate"
    found = {check.name: check.value for check in report.stages[-1].checks}
    assert found["perplexity_ratio"] is None and found["label_agreement"] is not None


def test_one_row_and_the_page(workshop: Workshop) -> None:
    report = workshop.verify(workshop.build("fp32", limits=Limits(1, 64)))
    assert report.passed and by_name(report)["ragged_batch_vs_single"] is None
    page = render_html(report, {})
    assert "6 prompts of up to 32 tokens" in page and "Same label" in page and "decode steps" not in page
    assert report.to_json()["perplexity_reference"] is None


def test_prompts_of_the_default_plan(workshop: Workshop) -> None:
    """Rows of about 300 tokens, prompts of every length up to 448, and one that fills the engine."""
    checkpoint = workshop.checkpoint
    inputs = parity_inputs(checkpoint.path, checkpoint.config, 1024)
    assert inputs.plan == CLASSIFIER_PLAN and inputs.classifies
    lengths = inputs.main_positions + 1
    assert (len(lengths), lengths[0], lengths[-1]) == (24, 18, 448) and inputs.ragged_prompts == (300, 96, 17)
    scored = scored_positions(inputs)
    assert [each.positions[-1] + 1 for each in scored] == [448, 300, 96, 17, 1024]
    assert [len(each.steps) for each in scored] == [0, 0, 0, 0, 16]
    assert (targets(inputs, scored) == -1).all()
    tiny = parity_inputs(checkpoint.path, checkpoint.config, 8)
    assert tiny.main_positions.tolist() == list(range(8)) and tiny.tail_positions.tolist() == [7]


def test_the_labels_rows_come_from_the_head_in_use(workshop: Workshop) -> None:
    whole = Checkpoint.open(workshop.checkpoint.path)
    source = EMBEDDING if whole.config.tie_word_embeddings else HEAD
    rows = EagerModel(workshop.checkpoint).values.read("head", HEAD, 0, 3)
    np.testing.assert_array_equal(rows, whole.read(source)[list(TASK.token_ids)].astype(np.float32))
