"""Our Hugging Face checkpoints beside those that modelopt exports from the same weights and magnitudes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from calibration.calibrate import CalibrateOptions, calibrate
from calibration.data import CalibrationData, DataSummary
from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.progress import NoProgress
from exporter.core.recipe import Precision, Recipe
from exporter.core.weights import QuantizedRows
from exporter.recipe_numbers import calibrated_numbers
from targets.tensorrt_llm.hf_form import write_hf
from targets.tensorrt_llm.hf_reader import open_hf
from targets.tensorrt_llm.target import TensorRtLlmTarget
from tests.targets.tensorrt_llm.modelopt_exports import IDS, Export, exported
from tests.targets.tensorrt_llm.sources import FP8, FP8_CHANNEL, INT4, W4A8, WIDE, quiet, recipe_of, source_of

pytest.importorskip("modelopt")

RECIPES: dict[str, Recipe] = {
    "FP8": recipe_of(FP8, "fp8"),
    "FP8_PER_CHANNEL_PER_TOKEN": recipe_of(FP8_CHANNEL),
    "W4A16_AWQ": recipe_of(INT4),
    "W4A8_AWQ": recipe_of(W4A8),
}
ExportFactory = Callable[[str], Export]


@pytest.fixture(scope="module")
def export(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ExportFactory:
    made: dict[str, Export] = {}

    def factory(algorithm: str) -> Export:
        if algorithm not in made:
            path = tmp_path_factory.mktemp(algorithm)
            made[algorithm] = exported(tiny_checkpoint("gqa", **WIDE), path, algorithm, kv_cache=algorithm == "FP8")
        return made[algorithm]

    return factory


def ours(checkpoint: Path, out: Path, algorithm: str, theirs: Export, rows: Any = None) -> dict[str, torch.Tensor]:
    """What we write for the magnitudes that modelopt saw; `rows` gives other codes than rounding to nearest."""
    scales = {name: amax / 448 for name, amax in theirs.input_amax.items()}
    caches = {layer: (keys / 448, values / 448) for layer, (keys, values) in theirs.kv_amax.items()}
    write_hf(source_of(checkpoint, RECIPES[algorithm], rows, scales, caches), out, quiet)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("algorithm", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_fp8_weights_are_theirs_byte_for_byte(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, algorithm: str
) -> None:
    """Theirs computed in float32 from the same bfloat16 weights, but for the types of what stays a float."""
    checkpoint = tiny_checkpoint("gqa", **WIDE)
    made = exported(checkpoint, tmp_path / "theirs", algorithm, algorithm == "FP8", torch.float32)
    theirs = load_file(made.path / "model.safetensors")
    (tmp_path / "ours").mkdir()
    found = ours(checkpoint, tmp_path / "ours", algorithm, made)
    assert found.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert found[name].shape == expected.shape, name
        if expected.dtype == torch.float8_e4m3fn:
            assert torch.equal(found[name].view(torch.uint8), expected.view(torch.uint8)), name
        elif name.endswith("weight_scale"):
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=0)
        elif name.endswith("scale"):
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=0)
        else:
            assert torch.equal(found[name], expected.bfloat16()), name


def test_a_calibration_of_ours_finds_their_scales(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """From the ids to the files, each by its own code; both in float32."""
    path, data = tiny_checkpoint("gqa", **WIDE), IDS.numpy()
    made = exported(path, tmp_path / "theirs", "FP8", kv_cache=True, dtype=torch.float32)
    checkpoint, recipe = Checkpoint.open(path), RECIPES["FP8"]
    calibration = CalibrationData(data, DataSummary("0" * 64, "text", 3, data.size, *data.shape, 0))
    options = CalibrateOptions(threads=1)
    parameters = calibrate(checkpoint, recipe, calibration, tmp_path / "q.safetensors", options, NoProgress())
    numbers = calibrated_numbers(checkpoint, recipe, parameters, TensorRtLlmTarget())
    (tmp_path / "ours").mkdir()
    source = source_of(path, recipe, numbers.rows, dict(numbers.input_scales), dict(numbers.kv_scales))
    write_hf(source, tmp_path / "ours", quiet)
    theirs, found = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    scales = [name for name in theirs if name.endswith("scale")]
    assert len(scales) == 2 * (7 + 7 + 2)
    for name in scales:
        rtol = 1e-6 if name.endswith("weight_scale") else 1e-4
        torch.testing.assert_close(found[name], theirs[name], rtol=rtol, atol=0, msg=name)
    for name in (name for name in found if name.endswith("proj.weight")):
        assert torch.equal(found[name].view(torch.uint8), theirs[name].view(torch.uint8)), name
    assert made.kv_amax.keys() == {0, 1}


@pytest.mark.parametrize("algorithm", ["FP8", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_in_bfloat16_only_their_second_rounding_differs(
    tiny_checkpoint: Callable[..., Path], export: ExportFactory, tmp_path: Path, algorithm: str
) -> None:
    """modelopt divides a bfloat16 matrix by its one scale in bfloat16, and rounds the quotient once more to E4M3."""
    checkpoint = tiny_checkpoint("gqa", **WIDE)
    theirs = load_file(export(algorithm).path / "model.safetensors")
    found = ours(checkpoint, tmp_path, algorithm, export(algorithm))
    source = load_file(checkpoint / "model.safetensors")
    assert found.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape), name
        if expected.dtype == torch.float8_e4m3fn and algorithm == "FP8":
            twice = (source[name] / found[f"{name}_scale"]).to(torch.float8_e4m3fn)
            assert torch.equal(twice.view(torch.uint8), expected.view(torch.uint8)), name
            apart = found[name].view(torch.uint8).int() - expected.view(torch.uint8).int()
            assert apart.abs().max() <= 1, name  # a code between two neighbours
        elif expected.dtype != torch.float32:
            assert torch.equal(found[name].view(torch.uint8), expected.view(torch.uint8)), name


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "W4A8_AWQ"])
def test_int4_bytes_and_scales_of_the_same_codes(
    tiny_checkpoint: Callable[..., Path], export: ExportFactory, tmp_path: Path, algorithm: str
) -> None:
    theirs = load_file(export(algorithm).path / "model.safetensors")
    found = ours(tiny_checkpoint("gqa", **WIDE), tmp_path, algorithm, export(algorithm), rows_of(theirs))
    assert found.keys() == theirs.keys()
    for name in theirs:
        assert (found[name].dtype, found[name].shape) == (theirs[name].dtype, theirs[name].shape), name
        if "_proj.weight" in name and not name.endswith("_scale_2"):
            assert torch.equal(found[name], theirs[name]), name


def rows_of(theirs: dict[str, torch.Tensor]) -> Any:
    """A reader of rows that gives the codes and scales of an export, unpacked here once more."""

    def rows(weight: CheckpointWeight, start: int, stop: int) -> "np.ndarray | QuantizedRows":
        name = weight.sources[0]
        stored = theirs[name]
        if stored.dtype != torch.uint8:
            return stored[start:stop].float().numpy().astype(_bfloat16())
        pairs = torch.stack([stored & 15, stored >> 4], 1).reshape(-1, stored.shape[1]).to(torch.int16)
        codes = torch.where(pairs > 7, pairs - 16, pairs).to(torch.int8).numpy()
        return QuantizedRows(codes[start:stop], theirs[f"{name}_scale"].numpy()[start:stop], None, weight.precision)

    return rows


def _bfloat16() -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16


def test_the_second_scale_of_w4a8_maps_the_largest_weight_to_448(
    tiny_checkpoint: Callable[..., Path], export: ExportFactory, tmp_path: Path
) -> None:
    theirs = load_file(export("W4A8_AWQ").path / "model.safetensors")
    found = ours(tiny_checkpoint("gqa", **WIDE), tmp_path, "W4A8_AWQ", export("W4A8_AWQ"), rows_of(theirs))
    for name in theirs:
        if name.endswith("weight_scale_2") and not name.endswith(("o_proj.weight_scale_2", "down_proj.weight_scale_2")):
            # Theirs is of the weights before int4, whose largest lies at a code of 7, up to rounding of bfloat16.
            torch.testing.assert_close(found[name], theirs[name], rtol=2**-7, atol=0)
    names = [f"model.layers.0.self_attn.{part}_proj.weight_scale_2" for part in "qkv"]
    assert len({float(found[name]) for name in names}) == 1


@pytest.mark.parametrize("algorithm", list(RECIPES))
def test_json_is_theirs_key_for_key(
    tiny_checkpoint: Callable[..., Path], export: ExportFactory, tmp_path: Path, algorithm: str
) -> None:
    ours(tiny_checkpoint("gqa", **WIDE), tmp_path, algorithm, export(algorithm))
    for name in ("hf_quant_config.json", "config.json"):
        theirs, found = (json.loads((path / name).read_text()) for path in (export(algorithm).path, tmp_path))
        for each in (theirs, found, theirs.get("quantization_config", {}), found.get("quantization_config", {})):
            each.pop("producer", None)
        if name == "config.json":
            assert list(found.pop("quantization_config")) == list(theirs["quantization_config"])
            assert json.loads((tmp_path / name).read_text())["quantization_config"].pop("producer")["name"]
            theirs_inline = theirs.pop("quantization_config")
            again = json.loads((tmp_path / name).read_text())["quantization_config"]
            again.pop("producer")
            assert again == theirs_inline
        assert found == theirs


@pytest.mark.parametrize("algorithm", list(RECIPES))
def test_their_exports_pass_our_checks(
    tiny_checkpoint: Callable[..., Path], export: ExportFactory, algorithm: str
) -> None:
    config = source_of(tiny_checkpoint("gqa", **WIDE), RECIPES[algorithm]).config
    open_hf(export(algorithm).path, config, RECIPES[algorithm]).validate()


@pytest.mark.parametrize("algorithm", list(RECIPES))
def test_our_reader_decodes_what_modelopt_computes_with(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, algorithm: str
) -> None:
    """In float32, so that only quantization rounds. Of AWQ the matrices whose scales stand in the file: modelopt
    averages those of q, k and v, and of gate and up, when it exports, and rounds these weights again."""
    checkpoint = tiny_checkpoint("gqa", **WIDE)
    theirs = exported(checkpoint, tmp_path, algorithm, dtype=torch.float32)
    config = source_of(checkpoint, RECIPES[algorithm]).config
    stored = open_hf(theirs.path, config, RECIPES[algorithm])
    names = ("self_attn.o_proj", "mlp.down_proj") if "AWQ" in algorithm else tuple(config.linear_shapes)
    for module in (f"model.layers.{layer}.{name}" for layer in range(2) for name in names):
        expected = theirs.weight(module)
        scale = getattr(theirs.model.get_submodule(module).input_quantizer, "_pre_quant_scale", None)
        expected = expected if scale is None else expected * scale.float()
        found = torch.from_numpy(stored.rows(f"{module}.weight", 0, len(expected)))
        # Where they simulate, they multiply by 448 / amax: halves between two E4M3 codes may go the other way. W4A8
        # rounds the int4 values once more to E4M3 there; the file holds them as they are.
        apart = ((found - expected).abs() > 1e-6 * expected.abs()).float().mean()
        if algorithm == "W4A8_AWQ":
            torch.testing.assert_close(found, expected, rtol=2**-4, atol=1e-9, msg=module)
        else:
            assert apart <= (5e-3 if algorithm.startswith("FP8") else 0), (module, float(apart))


def test_norms_of_an_export_are_floats_of_the_checkpoint(
    tiny_checkpoint: Callable[..., Path], export: ExportFactory
) -> None:
    path = tiny_checkpoint("gqa", **WIDE)
    stored = open_hf(export("FP8").path, source_of(path, RECIPES["FP8"]).config, RECIPES["FP8"])
    expected = load_file(path / "model.safetensors")["model.norm.weight"].float().numpy()
    np.testing.assert_array_equal(stored.rows("model.norm.weight", 5, 90), expected[5:90])


def test_scales_of_inputs_and_caches_are_read_as_they_stand(
    tiny_checkpoint: Callable[..., Path], export: ExportFactory
) -> None:
    theirs = export("FP8")
    stored = open_hf(theirs.path, source_of(tiny_checkpoint("gqa", **WIDE), RECIPES["FP8"]).config, RECIPES["FP8"])
    for module, scale in stored.input_scales.items():
        assert scale == pytest.approx(theirs.input_amax[module] / 448, rel=1e-6)
    assert stored.kv_scales.keys() == {0, 1} and len(stored.input_scales) == 14
    for layer, scales in stored.kv_scales.items():
        assert scales == pytest.approx([amax / 448 for amax in theirs.kv_amax[layer]], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_is_what_modelopt_quantizes_to(dtype: torch.dtype, tmp_path: Path) -> None:
    """Without the search of scales; its tensor-wide scale is of one matrix, so one is compared."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    from calibration.coded_floats import nvfp4_matrix_scale
    from calibration.rtn import absmax_rows
    from targets.tensorrt_llm.hf_tensors import Nvfp4Encoder

    weight = (torch.randn(32, 64, generator=torch.Generator().manual_seed(2)) * 0.05).to(dtype)
    packed, scales, second = NVFP4QTensor.quantize(weight, 16)
    amax = float(weight.float().abs().max())
    encoder = Nvfp4Encoder("x", (32, 64), 0.01, nvfp4_matrix_scale(amax))
    found = encoder.encode(absmax_rows(weight.float().numpy(), Precision("nvfp4", 16), amax))
    assert float(encoder.constants()["x.weight_scale_2"]) == pytest.approx(float(second), rel=1e-6)
    np.testing.assert_array_equal(found["x.weight_scale"], scales.view(torch.uint8).numpy())
    different = (found["x.weight"] != packed._quantized_data.numpy()).mean()
    assert different < 0.01  # halves between two codes: one of the two divides where the other multiplies
