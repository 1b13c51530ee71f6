"""TensorRT-LLM checkpoints written and read back: every algorithm, whole and cut."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

from calibration.positive_scales import positive_scales
from calibration.transformed import with_transforms
from calibration.transforms import FoldNorms, RotateResidual, ScaleInput
from calibration.weight_rows import WeightRows
from exporter.core.canonical import CheckpointWeight
from exporter.core.progress import NoProgress
from exporter.core.recipe import Override, Precision
from exporter.core.weights import QuantizedRows
from targets.base import BuildSource
from targets.tensorrt_llm import trtllm_form
from targets.tensorrt_llm.loader_rounding import loaded_rows
from tests.support.tiny import write_checkpoint
from tests.targets.tensorrt_llm.trtllm_sources import PRECISIONS, SHAPE, recipe_of, reopened, source_of, whole, written

CUTS = [(1, 1), (2, 1), (1, 2), (2, 3)]
BF16_STEP = 2.0**-8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), gain=0.5, **SHAPE)


def expected(source: BuildSource, layer: int, name: str) -> np.ndarray:
    """What the files must stand for: the codes that the source gives, except where the format rounds anew."""
    tensor, precision = f"model.layers.{layer}.{name}.weight", source.recipe.layer_precision(layer, name)
    if precision.kind == "int4" and precision.group_size != -1:
        found = source.rows(CheckpointWeight((tensor,), precision), 0, source.checkpoint.tensors[tensor].shape[0])
        assert isinstance(found, QuantizedRows)
        return positive_scales(found).dequantize()
    return whole(source, tensor, precision)


EXACT = [name for name in PRECISIONS if name not in ("FP8", "W8A16", "W4A16")]


@pytest.mark.parametrize("tp,pp", CUTS)
@pytest.mark.parametrize("name", EXACT)
def test_every_matrix_comes_back_as_it_was_quantized(
    checkpoint: Path, tmp_path: Path, name: str, tp: int, pp: int
) -> None:
    source = source_of(checkpoint, recipe_of(name), tp, pp)
    result = written(source, tmp_path / "out")
    stored = reopened(source, tmp_path / "out")
    for layer in range(3):
        for module, shape in source.config.linear_shapes.items():
            found = stored.rows(f"model.layers.{layer}.{module}.weight", 0, shape[0])
            np.testing.assert_array_equal(found, expected(source, layer, module), err_msg=f"{layer} {module}")
    assert sorted(result.files) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert result.report["quant_algo"] == (None if name == "bf16" else name.split("/")[0])


@pytest.mark.parametrize("tp,pp", [(1, 1), (4, 1), (2, 3)])
def test_tables_norms_and_biases_come_back_as_they_were(tmp_path: Path, tp: int, pp: int) -> None:
    source = source_of(write_checkpoint(tmp_path / "llama", "biases", **SHAPE), recipe_of("bf16"), tp, pp)
    written(source, tmp_path / "out")
    stored = reopened(source, tmp_path / "out")
    for name, info in source.checkpoint.tensors.items():
        found = stored.rows(name, 0, info.shape[0])
        np.testing.assert_array_equal(found, source.checkpoint.read(name).astype(np.float32), err_msg=name)


def test_rows_are_read_in_any_portions(checkpoint: Path, tmp_path: Path) -> None:
    source = source_of(checkpoint, recipe_of("W4A16_AWQ/64"), 4)
    written(source, tmp_path / "out")
    stored = reopened(source, tmp_path / "out")
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.down_proj.weight", "lm_head.weight"):
        rows = source.checkpoint.tensors[name].shape[0]
        everything = stored.rows(name, 0, rows)
        for start, stop in ((0, 1), (1, 2), (31, 33), (63, rows), (5, 5), (rows - 1, rows)):
            np.testing.assert_array_equal(stored.rows(name, start, stop), everything[start:stop])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_fp8_matrices_that_are_one_have_one_scale(checkpoint: Path, tmp_path: Path, tp: int) -> None:
    source = source_of(checkpoint, recipe_of("FP8"), tp)
    written(source, tmp_path / "out")
    stored = reopened(source, tmp_path / "out")
    for packs in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        originals = [source.checkpoint.read(f"model.layers.1.{name}.weight").astype(np.float32) for name in packs]
        scale = np.float32(max(np.abs(original).max() for original in originals)) / np.float32(448)
        for name, original in zip(packs, originals, strict=True):
            rounded = (original / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
            found = stored.rows(f"model.layers.1.{name}.weight", 0, len(original))
            np.testing.assert_array_equal(found, rounded)
    down = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(stored.rows(down, 0, 256), whole(source, down, PRECISIONS["FP8"]))


@pytest.mark.parametrize("name,bits", [("W8A16", 8), ("W4A16", 4)])
@pytest.mark.parametrize("tp", [1, 2])
def test_weight_only_files_hold_floats_and_count_as_the_loader_rounds_them(
    checkpoint: Path, tmp_path: Path, name: str, bits: int, tp: int
) -> None:
    source = source_of(checkpoint, recipe_of(name), tp)
    written(source, tmp_path / "out")
    with safe_open(tmp_path / "out" / "rank0.safetensors", "pt") as file:
        stored_weight = file.get_tensor("transformer.layers.0.mlp.proj.weight")
    original = source.checkpoint.read("model.layers.0.mlp.down_proj.weight").astype(np.float64)
    assert stored_weight.dtype == torch.bfloat16
    np.testing.assert_array_equal(stored_weight.double().numpy(), original[:, : 512 // tp])

    top, parts = 2.0 ** (bits - 1), []
    for part in np.split(original, tp, axis=1):  # each shard has scales of its own
        scale = np.abs(part).max(axis=1, keepdims=True) / top
        parts.append(np.clip(np.sign(part) * np.floor(np.abs(part) / scale + 0.5), -top, top - 1) * scale)
    stored = reopened(source, tmp_path / "out")
    found = stored.rows("model.layers.0.mlp.down_proj.weight", 0, 256)
    np.testing.assert_allclose(found, np.concatenate(parts, axis=1), rtol=1e-6)
    gate = CheckpointWeight(("model.layers.0.mlp.gate_proj.weight",), PRECISIONS[name])
    loaded = loaded_rows(source.rows, gate, 0, 512, "bf16")
    assert loaded is not None
    np.testing.assert_array_equal(stored.rows(gate.sources[0], 0, 512), loaded.dequantize())
    # Where a matrix is whole on every rank, what the engine will have is known exactly.
    assert ("model.layers.0.mlp.down_proj.weight" in stored.requantized) == (tp > 1)
    assert gate.sources[0] not in stored.requantized


@pytest.mark.parametrize("cache,wanted", [("fp8", (1.0, 2.5)), ("int8", (0.5, 2.5))])
def test_scales_of_caches_and_activations(
    checkpoint: Path, tmp_path: Path, cache: str, wanted: tuple[float, float]
) -> None:
    source = source_of(checkpoint, recipe_of("FP8", cache), 2, 3)
    written(source, tmp_path / "out")
    with safe_open(tmp_path / "out" / "rank1.safetensors", "np") as file:
        prefix = "transformer.layers.0.attention"
        names = ("k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_scaling_factor")
        assert [float(file.get_tensor(f"{prefix}.{name}")[0]) for name in names] == [*wanted, max(wanted)]
    stored = reopened(source, tmp_path / "out")
    # The loader takes the larger of both; scales of fp8 caches do not fall below 1.
    assert stored.kv_scales == dict.fromkeys(range(3), (2.5, 2.5))
    last_of_pack = source.input_scales["model.layers.2.self_attn.v_proj"]
    for name in ("q", "k", "v"):
        assert stored.input_scales[f"model.layers.2.self_attn.{name}_proj"] == np.float32(last_of_pack)
    assert stored.input_scales["model.layers.1.mlp.up_proj"] == np.float32(
        source.input_scales["model.layers.1.mlp.up_proj"]
    )


def test_second_scales_of_w4a8_bring_weights_into_the_range_of_e4m3(checkpoint: Path, tmp_path: Path) -> None:
    source = source_of(checkpoint, recipe_of("W4A8_AWQ"), 2)
    written(source, tmp_path / "out")
    for rank in (0, 1):
        with safe_open(tmp_path / "out" / f"rank{rank}.safetensors", "np") as file:
            second = float(file.get_tensor("transformer.layers.2.attention.qkv.weights_scaling_factor_2")[0])
        modules = [f"self_attn.{name}_proj" for name in "qkv"]
        largest = max(np.abs(expected(source, 2, name)).max() for name in modules)
        assert second == pytest.approx(largest / 448, rel=1e-6)


def test_layers_left_in_bf16_are_named_and_stay_so(checkpoint: Path, tmp_path: Path) -> None:
    overrides = (Override("layers.0.*", Precision("bf16")), Override("*.down_proj", Precision("bf16")))
    source = source_of(checkpoint, recipe_of("FP8", overrides=overrides), 2)
    written(source, tmp_path / "out")
    stored = reopened(source, tmp_path / "out")
    excluded = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["exclude_modules"]
    modules = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate")
    assert sorted(excluded) == sorted(
        [
            "lm_head",
            *(f"transformer.layers.0.{m}" for m in modules),
            *(f"transformer.layers.{n}.mlp.proj" for n in range(3)),
        ]
    )
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        np.testing.assert_array_equal(stored.rows(name, 0, 256), source.checkpoint.read(name).astype(np.float32))
    assert "model.layers.0.self_attn.q_proj" not in stored.input_scales


def test_layers_left_out_of_weight_only_rounding_stay_as_they_are(checkpoint: Path, tmp_path: Path) -> None:
    source = source_of(checkpoint, recipe_of("W8A16", overrides=(Override("layers.1.*", Precision("bf16")),)))
    written(source, tmp_path / "out")
    stored = reopened(source, tmp_path / "out")
    for layer, same in ((0, False), (1, True), (2, False)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        original = source.checkpoint.read(name).astype(np.float32)
        assert np.array_equal(stored.rows(name, 0, len(original)), original) == same


def test_a_tied_head_is_written_out(tmp_path: Path) -> None:
    source = source_of(write_checkpoint(tmp_path / "llama", "tied", **SHAPE), recipe_of("bf16"), 2, 3)
    written(source, tmp_path / "out")
    stored = reopened(source, tmp_path / "out")
    table = source.checkpoint.read("model.embed_tokens.weight").astype(np.float32)
    np.testing.assert_array_equal(stored.rows("lm_head.weight", 0, 333), table)
    np.testing.assert_array_equal(stored.rows("model.embed_tokens.weight", 0, 333), table)
    assert stored.config.tie_word_embeddings


def test_a_head_that_transforms_untied_is_a_matrix_of_its_own(tmp_path: Path) -> None:
    plain = source_of(write_checkpoint(tmp_path / "llama", "tied", **SHAPE), recipe_of("bf16"), 2)
    changed = with_transforms(plain.checkpoint, [FoldNorms()])
    written(replace(plain, checkpoint=changed, rows=WeightRows(changed)), tmp_path / "out")
    stored = reopened(plain, tmp_path / "out")
    assert plain.config.tie_word_embeddings and not stored.config.tie_word_embeddings
    wanted = whole(replace(plain, checkpoint=changed, rows=WeightRows(changed)), "lm_head.weight", Precision("bf16"))
    np.testing.assert_array_equal(stored.rows("lm_head.weight", 0, 333), wanted)


def test_the_transformed_weights_are_written(checkpoint: Path, tmp_path: Path) -> None:
    plain = source_of(checkpoint, recipe_of("FP8"))
    scale = np.linspace(0.5, 2, 512, dtype=np.float32)
    changed = with_transforms(plain.checkpoint, [ScaleInput(0, "mlp_hidden", scale), FoldNorms(), RotateResidual(7)])
    source = replace(plain, checkpoint=changed, rows=WeightRows(changed), config=changed.config)
    written(source, tmp_path / "out")
    stored = reopened(source, tmp_path / "out")
    np.testing.assert_array_equal(stored.rows("model.layers.0.input_layernorm.weight", 0, 256), np.ones(256))
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(stored.rows(name, 0, 256), whole(source, name, PRECISIONS["FP8"]))


def test_gptq_codes_keep_their_values_under_the_shared_scale(checkpoint: Path, tmp_path: Path) -> None:
    """Codes that an algorithm chose are not rounded anew from the weights."""
    plain = source_of(checkpoint, recipe_of("FP8"))

    def shifted(weight: CheckpointWeight, start: int, stop: int) -> "np.ndarray | QuantizedRows":
        found = plain.rows(weight, start, stop)
        if isinstance(found, QuantizedRows):
            return replace(found, codes=np.full_like(found.codes, 0x38))  # 1.0 everywhere
        return found

    source = replace(plain, rows=shifted, recipe=replace(plain.recipe, algorithms=("gptq",)))
    written(source, tmp_path / "out")
    stored = reopened(source, tmp_path / "out")
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        tensor = f"model.layers.0.{name}.weight"
        own = np.abs(source.checkpoint.read(tensor).astype(np.float32)).max() / np.float32(448)
        found = stored.rows(tensor, 0, source.checkpoint.tensors[tensor].shape[0])
        np.testing.assert_allclose(found, own, rtol=2.0**-4)  # half a step of E4M3


def test_the_same_source_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    source = source_of(checkpoint, recipe_of("W4A8_AWQ"), 2)
    for name in ("one", "two"):
        written(source, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("name", ["FP8", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "W8A8_SQ_PER_CHANNEL"])
def test_the_size_of_chunks_changes_no_byte(
    checkpoint: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of a few rows, which end inside of heads and shards."""
    source = source_of(checkpoint, recipe_of(name), 2)
    written(source, tmp_path / "whole")
    monkeypatch.setattr(trtllm_form, "CHUNK_ELEMENTS", 256 * 22)
    written(source, tmp_path / "pieces")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "pieces" / path.name).read_bytes(), path.name


def test_progress_goes_up_to_the_end(checkpoint: Path, tmp_path: Path) -> None:
    class Seen(NoProgress):
        def __init__(self) -> None:
            self.fractions: list[float] = []

        def advance(self, fraction: float, detail: str = "") -> None:
            self.fractions.append(fraction)

    seen = Seen()
    (tmp_path / "out").mkdir()
    trtllm_form.write_trtllm(source_of(checkpoint, recipe_of("FP8"), 2), tmp_path / "out", seen)
    assert seen.fractions == sorted(seen.fractions)
    assert seen.fractions[-1] == pytest.approx(1, abs=0.02)  # norms and biases are not counted
