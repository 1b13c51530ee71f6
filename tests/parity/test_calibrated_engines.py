"""Builds from quantization parameters: every kind of recipe through all stages, then its engine, on a tiny model."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from calibration.calibrate import CalibrateOptions, calibrate
from calibration.insert_precision import apply_recipe
from calibration.qparams import QParams
from exporter.calibrating import load_data
from exporter.calibration_request import CalibrationRequest
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import ParityError
from exporter.core.progress import NoProgress
from exporter.core.recipe import CHANNEL, TENSOR, Override, Precision, Recipe
from exporter.parity.html import render_html
from exporter.parity.inputs import ParityPlan
from exporter.parity.limits import SIMULATION_COARSE
from exporter.parity.report import VerifyReport
from exporter.parity.verify import EngineUnderTest, verify_artifact, verify_build
from exporter.passes.pipeline import fuse
from exporter.recipe_numbers import RecipeNumbers, calibrated_numbers, plain_numbers
from exporter.trace.trace import trace
from targets.base import BuildSource, Limits
from targets.onnxruntime.target import OnnxRuntimeTarget
from tests.conftest import CheckpointFactory
from tests.parity.faults import FAULTS, plant

LIMITS = Limits(max_batch=3, max_seq_len=128)
PLAN = ParityPlan(prefill=48, decode=64, single_steps=4, ragged=(48, 30, 12), ragged_steps=4, tail=16)
TEXT = Path(__file__).parents[1] / "support" / "tiny.py"

FLOAT = Precision()
INT8, INT4 = Precision("int8", 32), Precision("int4", 32)
W8A8 = Precision("int8", CHANNEL, activations="int8/token")
STATIC = Precision("int8", CHANNEL, activations="int8/tensor")
FP8 = Precision("fp8", TENSOR, activations="fp8/tensor")
FP8_TOKEN = Precision("fp8", CHANNEL, activations="fp8/token")
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("gptq", INT4, INT4, INT8, algorithms=("gptq",)),
        Recipe("awq", INT4, INT4, INT8, algorithms=("awq",)),
        Recipe("smoothquant", W8A8, INT8, INT8, algorithms=("smoothquant",)),
        Recipe("static", STATIC, INT8, INT8),
        Recipe("rotated", INT4, INT8, INT8, algorithms=("rotate", "gptq")),
        Recipe("w4a8", replace(INT4, activations="int8/token"), INT8, INT8, algorithms=("gptq",)),
        Recipe("fp8", FP8, FLOAT, FLOAT),
        Recipe("fp8-token", FP8_TOKEN, FLOAT, FLOAT),
        Recipe("int8-cache", INT8, INT8, INT8, kv_cache="int8"),
        Recipe("mixed", INT4, INT8, INT8, overrides=(Override("layers.1.*", INT8),), algorithms=("gptq",)),
    )
}
SIMULATED = {"simulation_relative_l2_error", "decode_vs_prefill", "long_position", "instrumented_vs_plain"}


@dataclass
class Workshop:
    """A checkpoint whose graphs are made once, calibrated and built by recipe."""

    checkpoint: Checkpoint
    out: Path

    def __post_init__(self) -> None:
        self.traced = trace(self.checkpoint.config)
        self.fused = fuse(self.traced, self.checkpoint.config, LIMITS.max_seq_len).model
        self.target = OnnxRuntimeTarget()

    def calibrate(self, recipe: Recipe) -> QParams:
        path = self.out / f"{recipe.name}.qparams"
        if not path.exists():
            data = load_data(self.checkpoint, CalibrationRequest(text=TEXT, tokens=512), 64)
            calibrate(self.checkpoint, recipe, data, path, CalibrateOptions(threads=1), NoProgress())
        return QParams.open(path)

    def numbers(self, recipe: Recipe) -> RecipeNumbers:
        return calibrated_numbers(self.checkpoint, recipe, self.calibrate(recipe), self.target, 1)

    def verify(self, recipe: Recipe, fault: str | None = None) -> tuple[EngineUnderTest, VerifyReport]:
        numbers = self.numbers(recipe)
        config = numbers.checkpoint.config
        model = apply_recipe(self.fused, recipe, config, numbers.input_scales)
        if fault:
            model = plant(model, 1, FAULTS[fault])
        directory = self.out / f"{recipe.name}-{len(list(self.out.iterdir()))}"
        directory.mkdir()
        source = BuildSource(
            config, recipe, model, numbers.checkpoint, numbers.rows, LIMITS, kv_scales=numbers.kv_scales
        )
        self.target.build(source, directory, NoProgress())
        engine = EngineUnderTest(self.target, directory, self.checkpoint, recipe, LIMITS, threads=1, plan=PLAN)
        return engine, verify_build(engine, self.traced, self.fused, model, numbers, NoProgress())


@pytest.fixture(scope="module")
def workshop(tiny_checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    # A layer adds little to the residual stream, as in trained models: rounding counts for as little as there.
    path = tiny_checkpoint("tied", rms_norm_eps=1e-5, hidden_size=128, intermediate_size=256, gain=0.3)
    return Workshop(Checkpoint.open(path), tmp_path_factory.mktemp("calibrated"))


def values(report: VerifyReport) -> dict[str, float | None]:
    return {check.name: check.value for check in report.checks}


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_and_the_engine_hold(name: str, workshop: Workshop) -> None:
    _, report = workshop.verify(RECIPES[name])
    assert report.passed and report.proof.simulation is True, report.describe()
    assert [stage.stage for stage in report.stages] == ["trace", "fuse", "quantize", "compile"]
    found = {check.name: check for check in report.stages[2].checks}
    rounds = any(precision.activations for precision in RECIPES[name].precisions)
    assert ("rounding_flips" in found) == rounds
    assert (found["local_error"].limit == SIMULATION_COARSE) == rounds


def test_hidden_states_of_a_rotated_model_are_compared_in_its_basis(workshop: Workshop) -> None:
    """The same sizes of error as without a rotation; in eager's own basis they would be as large as the states."""
    _, report = workshop.verify(RECIPES["rotated"])
    assert 0 < max(report.stages[2].layer_errors) < 0.3


@pytest.mark.parametrize("name", ["rotated", "fp8", "smoothquant"])
@pytest.mark.parametrize("fault", ["wrong_weight_source", "gate_up_weights_swapped"])
def test_a_fault_of_the_quantized_graph_is_found_in_its_layer(name: str, fault: str, workshop: Workshop) -> None:
    with pytest.raises(ParityError) as caught:
        workshop.verify(RECIPES[name], fault)
    found = caught.value.verification.first_divergence
    assert (found.stage, found.layer) == ("quantize", 1)


def test_without_its_parameters_an_engine_is_held_to_eager_alone(workshop: Workshop) -> None:
    recipe = RECIPES["rotated"]
    engine, _ = workshop.verify(recipe)
    report = verify_artifact(engine, NoProgress(), None)
    assert report.passed and report.proof.engine_run is True and report.proof.simulation is None
    unmeasured = {check.name: check for check in report.checks if check.value is None}
    assert unmeasured.keys() == SIMULATED
    assert all(check.to_json()["passed"] is None and "--qparams" in check.note for check in unmeasured.values())
    assert values(report)["chunked_vs_prefill"] is not None
    assert "were not run" in report.describe() and "held to eager alone" in render_html(report, {})
    whole = verify_artifact(engine, NoProgress(), workshop.numbers(recipe))
    assert whole.passed and whole.proof.simulation is True
    assert values(whole)["kl_divergence_mean"] == values(report)["kl_divergence_mean"]


def test_parameters_of_other_numbers_fail_the_simulation(workshop: Workshop) -> None:
    """An engine of GPTQ's codes beside a simulation that rounds to nearest."""
    recipe = RECIPES["gptq"]
    engine, _ = workshop.verify(recipe)
    report = verify_artifact(engine, NoProgress(), plain_numbers(workshop.checkpoint))
    assert not report.passed and report.proof.simulation is False
    assert report.first_divergence is not None and report.first_divergence.stage == "compile"
