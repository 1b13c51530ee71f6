"""compressed-tensors checkpoints: read back exactly, and loaded by transformers with the package itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.core.recipe import CHANNEL, Override, Precision, Recipe
from exporter.parity.reference import EagerModel
from exporter.parity.weight_values import WeightPrecisions
from targets.base import BuildSource
from targets.tensorrt_llm.compressed_config import quantization_config
from targets.tensorrt_llm.compressed_form import write_compressed
from targets.tensorrt_llm.compressed_reader import StoredCompressed, open_compressed
from targets.tensorrt_llm.formats import COMPRESSED
from targets.tensorrt_llm.target import TensorRtLlmTarget
from tests.targets.tensorrt_llm.sources import FP8, FP8_CHANNEL, NVFP4, W8A8, WIDE, quiet, recipe_of, source_of
from tests.targets.tensorrt_llm.test_hf_form import assert_read_back

Factory = Callable[..., Path]
W8A8_STATIC = Precision("int8", CHANNEL, activations="int8/tensor")
RECIPES: dict[str, Recipe] = {
    "fp8": recipe_of(FP8),
    "fp8 kv": recipe_of(FP8, "fp8"),
    "fp8-channel": recipe_of(FP8_CHANNEL),
    "int8": recipe_of(W8A8),
    "int8 static": recipe_of(W8A8_STATIC, "fp8"),
    "int4 g32": recipe_of(Precision("int4", 32)),
    "int4 g128": recipe_of(Precision("int4", 128)),
    "int4 channel": recipe_of(Precision("int4", CHANNEL)),
    "int8 weights": recipe_of(Precision("int8", 64)),
    "nvfp4": recipe_of(NVFP4),
    "nvfp4 weights": recipe_of(Precision("nvfp4", 16)),
    "bf16": recipe_of(Precision("bf16")),
    "int4 but one layer": recipe_of(Precision("int4", 32), overrides=(Override("layers.1.*", Precision("bf16")),)),
}


def written(checkpoint: Path, out: Path, recipe: Recipe, **source: Any) -> tuple[BuildSource, StoredCompressed]:
    found = source_of(checkpoint, recipe, **source)
    result = write_compressed(found, out, quiet)
    assert sorted(result.files) == sorted(path.name for path in out.iterdir())
    json.dumps(result.report)
    return found, open_compressed(out, found.config, recipe)


@pytest.mark.parametrize("name", list(RECIPES))
def test_what_was_written_is_read_back(tiny_checkpoint: Factory, tmp_path: Path, name: str) -> None:
    source, stored = written(tiny_checkpoint("gqa", **WIDE), tmp_path, RECIPES[name])
    stored.validate()
    # The global scale of nvfp4 is written as what divides: a unit in the last place apart.
    assert_read_back(stored, source, COMPRESSED, exact="nvfp4" not in name)
    static = source.recipe.linear.activations.endswith("/tensor")
    assert len(stored.input_scales) == (14 if static else 0)
    for module, scale in stored.input_scales.items():
        assert scale == pytest.approx(source.input_scales[module], rel=1e-6)
    assert {k: pytest.approx(v, rel=1e-7) for k, v in (source.kv_scales or {}).items()} == dict(stored.kv_scales)


@pytest.mark.parametrize("shape", ["tied", "biases", "head_dim", "llama3_rope", "mqa_three_layers"])
def test_other_shapes(tiny_checkpoint: Factory, tmp_path: Path, shape: str) -> None:
    source, stored = written(tiny_checkpoint(shape, gain=0.5), tmp_path, RECIPES["int4 g32"])
    stored.validate()
    assert_read_back(stored, source, COMPRESSED)


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_package_understands_the_config(name: str) -> None:
    package = pytest.importorskip("compressed_tensors.quantization")
    linear = RECIPES[name].linear
    if not linear.is_coded:
        return
    config = quantization_config(linear, RECIPES[name].kv_cache, ["lm_head"])
    config.pop("version")
    found = package.QuantizationConfig.model_validate(config)
    assert found.model_dump(mode="json") == config


PRESETS = {"fp8": "FP8", "fp8-channel": "FP8_DYNAMIC", "int8": "W8A8", "int4 g128": "W4A16", "nvfp4": "NVFP4"}


@pytest.mark.parametrize("name", list(PRESETS))
def test_schemes_are_the_presets_of_the_package(name: str) -> None:
    package = pytest.importorskip("compressed_tensors.quantization")
    preset = package.preset_name_to_scheme(PRESETS[name], ["Linear"]).model_dump(mode="json")
    group = quantization_config(RECIPES[name].linear, "bf16", ["lm_head"])["config_groups"]["group_0"]
    assert group.pop("format") and preset.pop("format") is None
    assert group == preset


def load(path: Path, dtype: torch.dtype) -> Any:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


IDS = np.random.default_rng(4).integers(0, 320, (2, 24))
# transformers computes these in float32 as the simulation does. NVFP4 it unpacks to bfloat16 always; tokens it rounds
# to int8 with a scale of max|x| / 127.5, where vLLM's kernels (csrc/quantization/w8a8/int8) and we have 127.
IN_FLOAT32 = [name for name in RECIPES if "nvfp4" not in name and name not in ("fp8 kv", "int8 static", "int8")]


@pytest.fixture(scope="module")
def model_path(tiny_checkpoint: Factory) -> Path:
    return tiny_checkpoint("gqa", gain=0.5, **WIDE)


def amax_scales(path: Path, top: float) -> dict[str, float]:
    """Scales of inputs from what the float model sees."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def see(module: Any, inputs: Any, name: str = name) -> None:
                seen[name] = float(inputs[0].abs().max()) / top

            module.register_forward_pre_hook(see)
    logits(model, IDS)
    return seen


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_transformers_computes_what_we_simulate(model_path: Path, tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    scales = amax_scales(model_path, 448.0)
    source, stored = written(model_path, tmp_path, recipe, input_scales=scales)
    found = logits(load(tmp_path, torch.float32), IDS)
    expected = simulated(source, stored)
    rounded = bool(recipe.linear.activations)
    # Rounded inputs: compressed-tensors divides where we multiply, so that halves between two codes may part; float32
    # sums in another order move them too. Without, only the order of float32 sums differs.
    assert relative(found, expected) < (1e-2 if rounded else 2e-5)
    plain = logits(load(model_path, torch.float32), IDS)
    assert relative(found, plain) < 0.5


@pytest.mark.parametrize("name", ["int8", "fp8", "fp8-channel"])
def test_without_rounded_inputs_transformers_has_our_weights(model_path: Path, tmp_path: Path, name: str) -> None:
    source, stored = written(model_path, tmp_path, RECIPES[name])
    expected = simulated(source, stored, rounded=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    if name == "fp8":  # the scales of inputs have no module then
        drop_input_scales(tmp_path / "model.safetensors")
    assert relative(logits(load(tmp_path, torch.float32), IDS), expected) < 2e-5


def drop_input_scales(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    kept = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("input_scale")}
    save_file(kept, path, metadata={"format": "pt"})


def simulated(source: BuildSource, stored: StoredCompressed, rounded: bool = True) -> np.ndarray:
    """Logits of the stored numbers in our eager model, inputs rounded as the target's servers do."""
    from exporter.parity.stored import StoredValues

    precisions = WeightPrecisions.from_recipe(source.recipe, stored.config)
    model = EagerModel(
        source.checkpoint,
        StoredValues(stored, precisions),
        activation_rounding=precisions.rounding(TensorRtLlmTarget().activation_rounding) if rounded else None,
        input_scales=stored.input_scales,
    )
    *_, final = model.boundaries(list(IDS))
    return np.stack([model.logits(row) for row in final])


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4 weights", "fp8 kv", "int8 static", "int8"])
def test_transformers_loads_the_others_too(model_path: Path, tmp_path: Path, name: str) -> None:
    top = {"nvfp4": 2688.0, "int8 static": 127.0}.get(name, 448.0)
    caches = dict.fromkeys(range(2), (0.02, 0.02))
    written(model_path, tmp_path, RECIPES[name], input_scales=amax_scales(model_path, top), kv_scales=caches)
    found = logits(load(tmp_path, torch.bfloat16), IDS)
    plain = logits(load(model_path, torch.bfloat16), IDS)
    assert relative(found, plain) < 0.5
