"""A fault in one layer is found, and the report names stage, layer and operator."""

from dataclasses import dataclass

import onnx_ir as ir
import pytest

from calibration.insert_precision import apply_recipe
from calibration.presets import preset
from exporter.core.canonical import CanonicalModel, CheckpointWeight, Slice
from exporter.core.checkpoint import Checkpoint
from exporter.core.progress import NoProgress
from exporter.parity.inputs import ParityInputs, ParityPlan, parity_inputs
from exporter.parity.stages import StageResults, verify_stages
from exporter.passes.pipeline import fuse
from exporter.recipe_numbers import plain_numbers
from exporter.trace.slices import TracedModel
from exporter.trace.trace import trace
from tests.conftest import CheckpointFactory
from tests.parity.faults import FAULTS, plant

LIMIT = 64
PLAN = ParityPlan(prefill=12, decode=6, single_steps=3, ragged=(10, 6, 3), ragged_steps=2, tail=4)


@dataclass(frozen=True)
class Prepared:
    checkpoint: Checkpoint
    traced: TracedModel
    fused: CanonicalModel
    inputs: ParityInputs

    def run(self, recipe: str = "fp32", **models: CanonicalModel) -> StageResults:
        fused = models.get("fused", self.fused)
        quantized = models.get("quantized", apply_recipe(fused, preset(recipe), self.checkpoint.config))
        rows = plain_numbers(self.checkpoint)
        return verify_stages(
            self.checkpoint, self.traced, fused, quantized, rows, preset(recipe), self.inputs, NoProgress().advance
        )


@pytest.fixture(scope="module", params=["torch-export", "torchscript"])
def prepared(request: pytest.FixtureRequest, tiny_checkpoint: CheckpointFactory) -> Prepared:
    # The epsilon of published Llamas: ten times the default of the tiny checkpoints.
    path = tiny_checkpoint("gqa", num_hidden_layers=3, rms_norm_eps=1e-5)
    checkpoint = Checkpoint.open(path)
    traced = trace(checkpoint.config, request.param)
    fused = fuse(traced, checkpoint.config, LIMIT).model
    return Prepared(checkpoint, traced, fused, parity_inputs(path, checkpoint.config, LIMIT, plan=PLAN))


def test_sound_model_passes(prepared: Prepared) -> None:
    results = prepared.run()
    assert results.first_divergence is None
    assert results.passed
    assert [stage.stage for stage in results.stages] == ["trace", "fuse"]


@pytest.mark.parametrize("name", FAULTS)
def test_fault_after_fusing(name: str, prepared: Prepared) -> None:
    results = prepared.run(fused=plant(prepared.fused, 1, FAULTS[name]))
    found = results.first_divergence
    assert found is not None
    assert (found.stage, found.layer) == ("fuse", 1)
    assert found.operator in FAULTS[name].operators, found
    assert not results.passed


@pytest.mark.parametrize("name", ["attention_scale", "swish_is_relu", "rms_norm_epsilon", "wrong_weight_source"])
def test_fault_after_quantizing(name: str, prepared: Prepared) -> None:
    recipe = "int4-rtn"
    quantized = apply_recipe(prepared.fused, preset(recipe), prepared.checkpoint.config)
    found = prepared.run(recipe, quantized=plant(quantized, 2, FAULTS[name])).first_divergence
    assert found is not None
    assert (found.stage, found.layer) == ("quantize", 2)
    assert found.operator in FAULTS[name].operators, found


def test_fault_in_the_trace(prepared: Prepared) -> None:
    """With nothing before it but eager: the region between two known values is named by its operators."""
    layers = list(prepared.traced.layers)
    structure = layers[1].structure.clone()
    softmax = next(node for node in structure.graph if node.op_type == "Softmax")
    softmax.attributes["axis"] = ir.AttrInt64("axis", 1)
    layers[1] = Slice("layer", 1, structure, layers[1].weights)
    damaged = TracedModel(prepared.traced.embedding, layers, prepared.traced.head)
    found = Prepared(prepared.checkpoint, damaged, prepared.fused, prepared.inputs).run().first_divergence
    assert found is not None
    assert (found.stage, found.layer) == ("trace", 1)
    assert "Softmax" in found.suspects


def test_fault_in_the_head(prepared: Prepared) -> None:
    fused = prepared.fused
    structure = fused.head.structure.clone()
    norm = next(node for node in structure.graph if node.op_type == "RMSNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)
    head = Slice("head", None, structure, fused.head.weights)
    found = prepared.run(fused=CanonicalModel(fused.embedding, fused.layers, head)).first_divergence
    assert found is not None
    assert (found.stage, found.layer, found.part, found.operator) == ("fuse", None, "head", "RMSNormalization")


def test_wrong_weight_in_the_head(prepared: Prepared) -> None:
    fused = prepared.fused
    wrong = {**fused.head.weights, "lm_head.weight": CheckpointWeight(("model.embed_tokens.weight",))}
    head = Slice("head", None, fused.head.structure, wrong)
    found = prepared.run(fused=CanonicalModel(fused.embedding, fused.layers, head)).first_divergence
    assert found is not None
    assert (found.stage, found.part, found.operator) == ("fuse", "head", "MatMul")


def test_fault_in_the_embedding(prepared: Prepared) -> None:
    fused = prepared.fused
    wrong = {"embed_tokens.weight": CheckpointWeight(("lm_head.weight",))}
    embedding = Slice("embedding", None, fused.embedding.structure, wrong)
    found = prepared.run(fused=CanonicalModel(embedding, fused.layers, fused.head)).first_divergence
    assert found is not None
    assert (found.stage, found.part, found.operator) == ("fuse", "embedding", "Gather")


def test_the_earliest_faulty_stage_is_named(prepared: Prepared) -> None:
    """A fault of the fused graph in layer 0 does not hide one of the trace in layer 2."""
    layers = list(prepared.traced.layers)
    wrong = {**layers[2].weights, "mlp.up_proj.weight": layers[1].weights["mlp.up_proj.weight"]}
    layers[2] = Slice("layer", 2, layers[2].structure, wrong)
    damaged = TracedModel(prepared.traced.embedding, layers, prepared.traced.head)
    both = Prepared(prepared.checkpoint, damaged, prepared.fused, prepared.inputs)
    results = both.run(fused=plant(prepared.fused, 0, FAULTS["swish_is_relu"]))
    assert [stage.stage for stage in results.stages] == ["trace"]
    found = results.first_divergence
    assert found is not None
    assert (found.stage, found.layer) == ("trace", 2)


def test_recipe_that_loses_too_much_is_blamed(prepared: Prepared) -> None:
    results = prepared.run("int4-rtn")
    found = results.first_divergence
    assert not results.passed
    assert found is not None
    assert found.stage == "quantize"
    assert found.operator is None
    assert "adds most" in found.note
