"""Whole calibrations of tiny models against transformers: what the file records is what the model itself shows."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from calibration.auto import AutoBudget
from calibration.calibrate import CalibrateOptions, calibrate
from calibration.data import CalibrationData, DataSummary
from calibration.forecast import working_bytes
from calibration.observers import Observer
from calibration.qparams import QParams
from calibration.recipe_json import recipe_to_json
from calibration.transformed import with_transforms
from calibration.transforms import CONSUMERS, FoldNorms, RotateHeads, RotateResidual, ScaleInput
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import BudgetError, InputError
from exporter.core.progress import NoProgress
from exporter.core.recipe import AlgorithmOptions, Precision, Recipe

INT4, INT8, BF16 = Precision("int4", 32), Precision("int8", 32), Precision("bf16")
W8A8 = Precision("int8", -1, activations="int8/token")
FP8 = Precision("fp8", 0, activations="fp8/tensor")
RECIPES = {
    "gptq": Recipe("gptq", INT4, INT4, INT8, algorithms=("gptq",)),
    "awq": Recipe("awq", INT4, INT4, INT8, algorithms=("awq",)),
    "awq and gptq": Recipe("awq and gptq", INT4, INT4, INT8, algorithms=("awq", "gptq")),
    "smoothquant": Recipe("smoothquant", W8A8, INT8, INT8, algorithms=("smoothquant",)),
    "smoothquant and gptq": Recipe("both", W8A8, INT8, INT8, algorithms=("smoothquant", "gptq")),
    "rotate and gptq": Recipe("rotate and gptq", INT4, INT4, INT8, algorithms=("rotate", "gptq")),
    "fp8": Recipe("fp8", FP8, BF16, BF16, kv_cache="fp8"),
}
Caches = tuple[np.ndarray, np.ndarray]
# float32 arithmetic of two layers in another order, relative to the largest value of a channel's kind.
CLOSE = 2e-5


def sequences(count: int = 6, length: int = 24) -> CalibrationData:
    ids = np.random.default_rng(1).integers(0, 320, (count, length))
    return CalibrationData(ids, DataSummary("0" * 64, "text", 3, ids.size, count, length, 0))


class Interrupting(NoProgress):
    """Records the details; Ctrl-C when one begins as asked."""

    def __init__(self, when: str | None = None) -> None:
        self.when = when
        self.seen: list[str] = []

    def advance(self, fraction: float, detail: str = "") -> None:
        self.seen.append(detail)
        if self.when is not None and detail.startswith(self.when):
            raise KeyboardInterrupt


def run(path: Path, recipe: Recipe, out: Path, **options: object) -> QParams:
    data = sequences()
    return calibrate(Checkpoint.open(path), recipe, data, out, CalibrateOptions(threads=1, **options), NoProgress())  # type: ignore[arg-type]


def observe(
    model: LlamaForCausalLM, data: CalibrationData
) -> tuple[dict[str, np.ndarray], list[tuple[np.ndarray, ...]]]:
    """Largest magnitude of each input channel of each Linear, and of each channel of the caches."""
    seen: dict[str, np.ndarray] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0].abs().amax((0, 1)).numpy())
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.inference_mode():
        cache = model(torch.from_numpy(data.ids), use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    largest = [
        tuple(part.abs().amax((0, 2)).flatten().numpy() for part in (layer.keys, layer.values))
        for layer in cache.layers
    ]
    return seen, largest


def with_weights(path: Path, checkpoint: Checkpoint, codes: QParams | None) -> LlamaForCausalLM:
    """The model in float32 with the weights of a (transformed) checkpoint, and codes in place of those that have some.

    The head stays apart from the embedding.
    """
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    state = model.state_dict()
    for name in state:
        source = checkpoint.config.head_source if name == "lm_head.weight" else name
        values = checkpoint.read(source).astype(np.float32)
        if codes is not None and "layers" in name and name.endswith("_proj.weight"):
            module = name.split(".", 3)[3].removesuffix(".weight")
            layer = int(name.split(".")[2])
            precision = codes.recipe.layer_precision(layer, module)
            rows = codes.rows(name, precision, 0, len(values))
            values = values if rows is None else rows.dequantize()
        state[name].copy_(torch.from_numpy(values))
    return model


def modules(model: LlamaForCausalLM) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def check_statistics(found: QParams, model: LlamaForCausalLM, seen: Mapping[str, np.ndarray], tolerance: float) -> None:
    for name in modules(model):
        recorded = found.input_amax(name)
        assert recorded is not None, name
        np.testing.assert_allclose(recorded, seen[name], atol=tolerance * seen[name].max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("shape", ["gqa", "mha", "biases", "tied", "head_dim"])
def test_statistics_without_algorithms_are_those_of_the_model(
    shape: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_checkpoint(shape)
    found = run(path, RECIPES["fp8"], tmp_path / "q")
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    seen, caches = observe(model, sequences())
    check_statistics(found, model, seen, CLOSE)
    name = "model.layers.1.mlp.down_proj"
    assert found.input_scale(name, "fp8/tensor") == pytest.approx(seen[name].max() / 448, rel=CLOSE)
    for layer, (keys, values) in enumerate(caches):
        recorded = found.kv_amax(layer)
        assert recorded is not None
        np.testing.assert_allclose(recorded[0], keys, atol=CLOSE * keys.max(), rtol=0)
        np.testing.assert_allclose(recorded[1], values, atol=CLOSE * values.max(), rtol=0)
        assert found.kv_scales(layer, "fp8")[0] == pytest.approx(keys.max() / 448, rel=CLOSE)
    assert not found.transforms


@pytest.mark.parametrize("shape", ["gqa", "biases", "mqa_three_layers"])
@pytest.mark.parametrize("name", ["gptq", "awq and gptq", "smoothquant and gptq", "rotate and gptq"])
def test_with_gptq_each_matrix_sees_what_the_rounded_ones_before_it_leave(
    name: str, shape: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_checkpoint(shape)
    found = run(path, RECIPES[name], tmp_path / "q")
    checkpoint = with_transforms(Checkpoint.open(path), found.transforms)
    model = with_weights(path, checkpoint, found)
    for module in modules(model)[:-1]:
        layer, matrix = int(module.split(".")[2]), module.split(".", 3)[3]
        assert found.rows(f"{module}.weight", found.recipe.layer_precision(layer, matrix), 0, 1) is not None
    seen, caches = observe(model, sequences())
    # Scales of codes are stored as given, so that only the order of float32 sums differs.
    check_statistics(found, model, seen, CLOSE)
    for layer, (keys, values) in enumerate(caches):
        recorded = found.kv_amax(layer)
        assert recorded is not None
        np.testing.assert_allclose(recorded[0], keys, atol=CLOSE * keys.max(), rtol=0)
        np.testing.assert_allclose(recorded[1], values, atol=CLOSE * values.max(), rtol=0)


@pytest.mark.parametrize("shape", ["gqa", "biases", "mha"])
@pytest.mark.parametrize("name", ["awq", "smoothquant"])
def test_scales_of_inputs_leave_the_function_and_are_in_the_statistics(
    name: str, shape: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_checkpoint(shape)
    found = run(path, RECIPES[name], tmp_path / "q")
    original = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ids = torch.from_numpy(sequences().ids)
    with torch.inference_mode():
        expected = original(ids).logits
        model = with_weights(path, with_transforms(Checkpoint.open(path), found.transforms), None)
        logits = model(ids).logits
    assert found.transforms and all(isinstance(each, ScaleInput) for each in found.transforms)
    torch.testing.assert_close(logits, expected, rtol=0, atol=CLOSE * float(expected.abs().max()))
    seen, caches = observe(model, sequences())
    check_statistics(found, model, seen, CLOSE)
    for layer, (_, values) in enumerate(caches):
        recorded = found.kv_amax(layer)
        assert recorded is not None
        np.testing.assert_allclose(recorded[1], values, atol=CLOSE * values.max(), rtol=0)


def test_gptq_lowers_the_error_that_rounding_to_nearest_makes(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Against transformers with the weights of each: the last hidden state moves less on the calibration data."""
    path = tiny_checkpoint("gqa")
    from calibration.rtn import quantize_rows

    checkpoint = Checkpoint.open(path)
    found = run(path, RECIPES["gptq"], tmp_path / "q")
    exact, gptq = with_weights(path, checkpoint, None), with_weights(path, checkpoint, found)
    nearest = with_weights(path, checkpoint, None)
    for name, tensor in nearest.state_dict().items():
        if "layers" in name and name.endswith("_proj.weight"):
            tensor.copy_(torch.from_numpy(quantize_rows(tensor.numpy().copy(), INT4).dequantize()))
    ids = torch.from_numpy(sequences().ids)
    with torch.inference_mode():
        states = [each.model(ids).last_hidden_state for each in (exact, gptq, nearest)]
    assert (states[1] - states[0]).norm() < 0.9 * (states[2] - states[0]).norm()


def test_rotations_come_first_and_untie_the_head(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    found = run(tiny_checkpoint("tied"), RECIPES["rotate and gptq"], tmp_path / "q", seed=5)
    assert found.transforms == (FoldNorms(), RotateResidual(5), RotateHeads(5))
    assert found.rows("lm_head.weight", INT4, 0, 320) is not None
    assert found.rows("model.embed_tokens.weight", INT8, 0, 1) is None


def test_an_observer_clips_the_single_scale_of_an_input(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path, options = tiny_checkpoint("gqa"), AlgorithmOptions(observer="percentile", percentile=90.0)
    found = run(path, replace(RECIPES["fp8"], options=options), tmp_path / "q")
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    inputs = []
    module = model.model.layers[1].mlp.down_proj
    module.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1).numpy()))
    with torch.inference_mode():
        model(torch.from_numpy(sequences().ids))
    # 144 tokens: all of them are in the sample.
    clip = float(Observer("percentile", percentile=90.0).amax(inputs[0])[0, 0])
    assert found.input_scale("model.layers.1.mlp.down_proj", "fp8/tensor") == pytest.approx(clip / 448, rel=CLOSE)


@pytest.mark.parametrize("name", ["gptq", "awq", "fp8"])
def test_activations_on_disk_change_no_byte(name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_checkpoint("gqa")
    recipe = RECIPES[name]
    run(path, recipe, tmp_path / "memory")
    least = working_bytes(Checkpoint.open(path).config, recipe, 24)
    run(path, recipe, tmp_path / "disk", max_ram=least)
    assert (tmp_path / "memory").read_bytes() == (tmp_path / "disk").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["disk", "memory"]
    with pytest.raises(BudgetError, match="max-ram"):
        run(path, recipe, tmp_path / "refused", max_ram=least - 1)


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("gptq", "layer 1 of 3: mlp"),
        ("rotate and gptq", "layer 2 of 3: attention"),
        ("awq", "layer 3 of 3: mlp"),
        ("fp8", "layer 2 of 3: attention"),
        ("fp8", "head"),
    ],
)
def test_an_interrupted_run_goes_on_after_the_last_finished_layer(
    name: str, when: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint, recipe = Checkpoint.open(tiny_checkpoint("mqa_three_layers")), RECIPES[name]
    whole = tmp_path / "whole"
    calibrate(checkpoint, recipe, sequences(), whole, CalibrateOptions(threads=1), NoProgress())
    options = CalibrateOptions(threads=1, work_dir=tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, recipe, sequences(), tmp_path / "out", options, Interrupting(when))
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "work").glob("activations-*"))
    resumed = Interrupting()
    calibrate(checkpoint, recipe, sequences(), tmp_path / "out", options, resumed)
    assert resumed.seen[0].startswith(when.split(":")[0])
    assert (tmp_path / "out").read_bytes() == whole.read_bytes()
    assert not list((tmp_path / "work").iterdir())


def test_a_work_directory_serves_one_calibration(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, work = Checkpoint.open(tiny_checkpoint("gqa")), tmp_path / "work"
    options = CalibrateOptions(threads=1, work_dir=work)
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, RECIPES["fp8"], sequences(), tmp_path / "q", options, Interrupting("layer 2"))
    for recipe, data, words in (
        (RECIPES["awq"], sequences(), "recipe"),
        (RECIPES["fp8"], sequences(5), "data"),
    ):
        with pytest.raises(InputError, match=f"other {words}") as refusal:
            calibrate(checkpoint, recipe, data, tmp_path / "q", options, NoProgress())
        assert refusal.value.kind == "work_dir.other"
    other = Checkpoint.open(tiny_checkpoint("mha"))
    with pytest.raises(InputError, match="other checkpoint"):
        calibrate(other, RECIPES["fp8"], sequences(), tmp_path / "q", options, NoProgress())
    (work / "hidden-0000.f32").write_bytes(b"short")
    with pytest.raises(InputError) as refusal:
        calibrate(checkpoint, RECIPES["fp8"], sequences(), tmp_path / "q", options, NoProgress())
    assert refusal.value.kind == "work_dir.damaged"


def test_what_auto_chose_is_kept_for_the_resumed_run(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gqa", hidden_size=128, intermediate_size=256))
    recipe = Recipe("auto", Precision("int4", 128), INT4, INT8, algorithms=("gptq",))
    options = CalibrateOptions(threads=1, work_dir=tmp_path / "work", budget=AutoBudget(target_bits=5.0))
    out = tmp_path / "q"
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, recipe, sequences(), out, options, Interrupting("layer 2 of 2"))
    chosen = json.loads((tmp_path / "work" / "recipe.json").read_text())
    resumed = Interrupting()
    found = calibrate(checkpoint, recipe, sequences(), out, options, resumed)
    assert resumed.seen[0].startswith("layer 2 of 2")
    assert recipe_to_json(found.recipe) == chosen["recipe"] and found.recipe.name == "auto"
    assert found.reports["auto"] == chosen["report"]
    bits = found.reports["auto"]["bits_per_weight"]
    assert isinstance(bits, float) and bits <= 5.0
    for layer in range(2):
        for names in CONSUMERS.values():
            for name in names:
                precision = found.recipe.layer_precision(layer, name)
                assert found.rows(f"model.layers.{layer}.{name}.weight", precision, 0, 1) is not None


def test_two_runs_do_not_share_a_work_directory(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, options = (
        Checkpoint.open(tiny_checkpoint("gqa")),
        CalibrateOptions(threads=1, work_dir=tmp_path / "work"),
    )

    class Second(NoProgress):
        def advance(self, fraction: float, detail: str = "") -> None:
            calibrate(checkpoint, RECIPES["fp8"], sequences(), tmp_path / "q", options, NoProgress())

    with pytest.raises(InputError) as refusal:
        calibrate(checkpoint, RECIPES["fp8"], sequences(), tmp_path / "q", options, Second())
    assert refusal.value.kind == "work_dir.in_use"


def test_recipes_without_text(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gqa"))
    for name, words in (("gptq", "gptq"), ("fp8", "scales of activations")):
        with pytest.raises(InputError, match=words) as refusal:
            calibrate(checkpoint, RECIPES[name], None, tmp_path / "q", CalibrateOptions(threads=1), NoProgress())
        assert refusal.value.kind == "recipe.needs_data" and refusal.value.exit_code == 2
    rotated = Recipe("rotated", INT4, INT4, INT8, algorithms=("rotate",))
    found = calibrate(checkpoint, rotated, None, tmp_path / "q", CalibrateOptions(threads=1), NoProgress())
    assert found.transforms == (FoldNorms(), RotateResidual(0), RotateHeads(0)) and found.data is None


def test_groups_that_divide_nothing_are_refused_before_weights_are_read(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = RECIPES["gptq"].with_group_size(256)
    with pytest.raises(BudgetError, match=r"mlp\.down_proj") as refusal:
        run(tiny_checkpoint("gqa"), recipe, tmp_path / "q")
    assert refusal.value.exit_code == 6


def test_a_model_that_overflows_names_the_layer(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_checkpoint("gqa", gain=1e19)
    with pytest.raises(InputError, match=r"layer \d: (attention|mlp)_") as refusal:
        run(path, RECIPES["fp8"], tmp_path / "q")
    assert refusal.value.kind == "calibrate.not_finite"
    assert not list(tmp_path.iterdir())


def test_every_point_has_statistics_whatever_the_recipe(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    found = run(tiny_checkpoint("gqa"), RECIPES["awq"], tmp_path / "q")
    for layer in range(2):
        for names in CONSUMERS.values():
            for name in names:
                assert found.input_amax(f"model.layers.{layer}.{name}") is not None
    assert found.input_amax("lm_head") is not None
