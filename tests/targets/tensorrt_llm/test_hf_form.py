"""Hugging Face checkpoints of ModelOpt: written in any portions, read back exactly, described truly."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from calibration.transformed import with_transforms
from calibration.transforms import FoldNorms
from calibration.weight_rows import WeightRows
from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.errors import InputError, UnsupportedError
from exporter.core.recipe import Override, Precision, Recipe
from exporter.core.weights import QuantizedRows
from exporter.parity.weight_values import as_float
from targets.base import BuildSource, StoredModel
from targets.tensorrt_llm import streamed_files
from targets.tensorrt_llm.formats import HF, matrix_precisions
from targets.tensorrt_llm.hf_config import excluded_modules
from targets.tensorrt_llm.hf_form import write_hf
from targets.tensorrt_llm.hf_reader import open_hf
from targets.tensorrt_llm.served_rows import served_rows
from tests.targets.tensorrt_llm.sources import FP8, FP8_CHANNEL, INT4, NVFP4, W4A8, WIDE, quiet, recipe_of, source_of

Factory = Callable[..., Path]
RECIPES: dict[str, Recipe] = {
    "fp8": recipe_of(FP8),
    "fp8 kv": recipe_of(FP8, "fp8"),
    "fp8-channel": recipe_of(FP8_CHANNEL, "fp8"),
    "int4": recipe_of(INT4),
    "int4 g64": recipe_of(Precision("int4", 64)),
    "w4a8 kv": recipe_of(W4A8, "fp8"),
    "nvfp4": recipe_of(NVFP4),
    "bf16": recipe_of(Precision("bf16")),
    "fp16": recipe_of(Precision("fp16"), "fp16", "fp16"),
    "fp8 but one layer": recipe_of(
        FP8,
        "fp8",
        overrides=(Override("layers.1.*", Precision("bf16")), Override("layers.0.*o_proj", Precision("bf16"))),
    ),
}


def assert_read_back(stored: StoredModel, source: BuildSource, form: str, exact: bool = True) -> None:
    """Every tensor of the model, in odd portions, is what the rows of the source say."""
    config = source.checkpoint.config
    kind = source.recipe.lm_head.kind
    rows = served_rows(source.rows, form, kind)
    precisions = matrix_precisions(config, source.recipe)
    for name, shape in config.tensor_shapes.items():
        precision = precisions.get(name.removesuffix(".weight"), Precision(kind))
        expected = as_float(rows(CheckpointWeight((name,), precision), 0, shape[0]))
        for start, stop in ((0, shape[0]), (3, 8), (shape[0] - 1, shape[0]), (4, 4)):
            found = stored.rows(name, start, stop)
            assert found.dtype == np.float32
            if exact:
                np.testing.assert_array_equal(found, expected[start:stop], name)
            else:
                np.testing.assert_allclose(found, expected[start:stop], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", list(RECIPES))
def test_what_was_written_is_read_back(tiny_checkpoint: Factory, tmp_path: Path, name: str) -> None:
    source = source_of(tiny_checkpoint("gqa", **WIDE), RECIPES[name])
    written = write_hf(source, tmp_path, quiet)
    stored = open_hf(tmp_path, source.config, source.recipe)
    stored.validate()
    assert_read_back(stored, source, HF)
    for module, scale in stored.input_scales.items():
        assert scale == pytest.approx(source.input_scales[module], rel=1e-7)
    rounded = "tensor" in source.recipe.linear.activations
    assert len(stored.input_scales) == (6 if "one layer" in name else 14 if rounded else 0)
    assert {k: pytest.approx(v, rel=1e-7) for k, v in (source.kv_scales or {}).items()} == dict(stored.kv_scales)
    assert sorted(written.files) == sorted(path.name for path in tmp_path.iterdir())
    assert ("hf_quant_config.json" in written.files) == source.recipe.linear.is_coded
    json.dumps(written.report)


@pytest.mark.parametrize("shape", ["tied", "biases", "head_dim", "odd_vocabulary", "llama3_rope", "mqa_three_layers"])
def test_other_shapes(tiny_checkpoint: Factory, tmp_path: Path, shape: str) -> None:
    source = source_of(tiny_checkpoint(shape, **WIDE), recipe_of(Precision("int4", 64)))
    write_hf(source, tmp_path, quiet)
    stored = open_hf(tmp_path, source.config, source.recipe)
    stored.validate()
    assert_read_back(stored, source, HF)
    found = ModelConfig.from_directory(_without_quantization(tmp_path))
    assert (found.rope, found.tie_word_embeddings) == (source.config.rope, source.config.tie_word_embeddings)
    if shape == "tied":
        np.testing.assert_array_equal(
            stored.rows("lm_head.weight", 3, 9), stored.rows("model.embed_tokens.weight", 3, 9)
        )


def _without_quantization(path: Path) -> Path:
    config = json.loads((path / "config.json").read_text())
    config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("shape", "keys"), [("llama3_rope", 2), ("linear_rope", 2), ("gqa", 0)])
def test_rope_is_told_in_the_words_of_older_servers_too(
    tiny_checkpoint: Factory, tmp_path: Path, shape: str, keys: int
) -> None:
    """and transformers 5 reads the same as from the checkpoint itself."""
    from transformers import AutoConfig

    source = source_of(tiny_checkpoint(shape, **WIDE), RECIPES["bf16"])
    write_hf(source, tmp_path, quiet)
    config = json.loads((tmp_path / "config.json").read_text())
    found = {name: config[name] for name in ("rope_theta", "rope_scaling") if name in config}
    assert len(found) == keys
    if keys:
        rope = source.config.rope
        assert found["rope_theta"] == rope.theta
        assert found["rope_scaling"]["rope_type"] == rope.type and found["rope_scaling"]["factor"] == rope.factor
    theirs, ours = (AutoConfig.from_pretrained(path).rope_parameters for path in (source.checkpoint.path, tmp_path))
    assert theirs == ours


def test_a_head_that_transforms_untied_stands_in_the_files(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    path = tiny_checkpoint("tied", **WIDE)
    checkpoint = with_transforms(Checkpoint.open(path), [FoldNorms()])
    assert not checkpoint.config.tie_word_embeddings
    source = source_of(path, recipe_of(FP8))
    source = BuildSource(**{**source.__dict__, "checkpoint": checkpoint, "rows": WeightRows(checkpoint)})
    write_hf(source, tmp_path, quiet)
    stored = open_hf(tmp_path, source.config, source.recipe)
    stored.validate()
    assert_read_back(stored, source, HF)
    assert not stored.config.tie_word_embeddings
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", ["int4", "nvfp4", "fp8 kv"])
def test_shards_and_portions_change_no_byte(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = source_of(tiny_checkpoint("gqa", **WIDE), RECIPES[name])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    write_hf(source, whole, quiet)
    monkeypatch.setattr(streamed_files, "CHUNK_ELEMENTS", 700)
    written = write_hf(source, cut, quiet, shard_bytes=100_000)
    shards = sorted(file for file in written.files if file.endswith(".safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.weights_bytes
    stored = open_hf(cut, source.config, source.recipe)
    stored.validate()
    with safe_open(whole / "model.safetensors", "pt") as one:
        assert one.metadata() == {"format": "pt"}
        assert set(one.keys()) == set(index["weight_map"])
        for tensor in index["weight_map"]:
            with safe_open(cut / index["weight_map"][tensor], "pt") as part:
                expected, found = (file.get_tensor(tensor) for file in (one, part))
                assert expected.dtype == found.dtype and expected.tolist() == found.tolist(), tensor


def test_rows_are_asked_for_in_small_even_portions(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_files, "CHUNK_ELEMENTS", 1000)
    path = tiny_checkpoint("gqa", **WIDE)
    plain, asked = WeightRows(Checkpoint.open(path)), []

    def rows(weight: CheckpointWeight, start: int, stop: int) -> "np.ndarray | QuantizedRows":
        asked.append((weight.sources[0], start, stop))
        return plain(weight, start, stop)

    source = source_of(path, RECIPES["int4"], rows)
    write_hf(source, tmp_path, quiet)
    for name, start, stop in asked:
        shape = source.config.tensor_shapes[name]
        width = shape[1] if len(shape) > 1 else 1
        assert start % 2 == 0 and (stop - start) * width <= max(1000, 2 * width)
    covered = sum(stop - start for _, start, stop in asked)
    assert covered == sum(shape[0] for shape in source.config.tensor_shapes.values())


def test_a_float32_checkpoint_becomes_bfloat16(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    import torch

    source = source_of(tiny_checkpoint("gqa", dtype=torch.float32, **WIDE), recipe_of(FP8))
    report = write_hf(source, tmp_path, quiet).report
    assert report["float_type"] == "bf16"
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    stored = open_hf(tmp_path, source.config, source.recipe)
    stored.validate()
    assert_read_back(stored, source, HF)


def test_scales_are_positive_and_pre_quant_scales_are_ones(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = source_of(tiny_checkpoint("gqa", **WIDE), RECIPES["int4"])
    rows = source.rows(CheckpointWeight(("model.layers.0.mlp.up_proj.weight",), INT4), 0, 256)
    assert isinstance(rows, QuantizedRows) and (rows.scales < 0).any()
    write_hf(source, tmp_path, quiet)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        scales = [name for name in set(file.keys()) if name.endswith(".weight_scale")]
        assert len(scales) == 14 and all(bool((file.get_tensor(name) > 0).all()) for name in scales)
        pre_quant = [name for name in set(file.keys()) if name.endswith("pre_quant_scale")]
        assert len(pre_quant) == 4 and all(bool((file.get_tensor(name) == 1).all()) for name in pre_quant)


def test_an_input_that_was_not_calibrated(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = source_of(tiny_checkpoint("gqa", **WIDE), RECIPES["fp8"], input_scales={})
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj") as caught:
        write_hf(source, tmp_path, quiet)
    assert caught.value.kind == "calibration.input_scale" and not list(tmp_path.iterdir())


def test_nvfp4_scales_of_different_matrix_scales_are_refused(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    path = tiny_checkpoint("gqa", **WIDE)
    plain = WeightRows(Checkpoint.open(path))

    def rows(weight: CheckpointWeight, start: int, stop: int) -> "np.ndarray | QuantizedRows":
        found = plain(weight, start, stop)
        if isinstance(found, QuantizedRows) and "v_proj" in weight.sources[0]:
            return QuantizedRows(found.codes, found.scales * np.float32(1.01), None, found.precision)
        return found

    with pytest.raises(UnsupportedError, match=r"v_proj") as caught:
        write_hf(source_of(path, RECIPES["nvfp4"], rows), tmp_path, quiet)
    assert caught.value.kind == "recipe.nvfp4_scale" and caught.value.remedy


def test_a_generation_config_is_the_checkpoint_s_or_made(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = source_of(tiny_checkpoint("gqa", **WIDE), RECIPES["bf16"])
    write_hf(source, tmp_path, quiet)
    expected = json.loads((source.checkpoint.path / "generation_config.json").read_text())
    assert json.loads((tmp_path / "generation_config.json").read_text()) == expected
    without = tmp_path / "without"
    without.mkdir()
    for name in ("config.json", "model.safetensors"):
        (without / name).write_bytes((source.checkpoint.path / name).read_bytes())
    out = tmp_path / "out"
    out.mkdir()
    write_hf(source_of(without, RECIPES["bf16"]), out, quiet)
    made = json.loads((out / "generation_config.json").read_text())
    assert made == {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def test_excluded_modules_as_modelopt_sums_them_up() -> None:
    quant_utils = pytest.importorskip("modelopt.torch.export.quant_utils")
    modules = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.x")]
    for plain in ([], modules[3:6], modules[1:2], [m for m in modules if ".1." in m or ".11." in m], modules[33:]):
        coded = [module for module in modules if module not in plain]
        every = ["lm_head", "model.embed_tokens", *plain]
        expected = sorted(quant_utils._prefix_wildcard_summarize_exclude_modules(every, coded))
        assert excluded_modules(coded, plain) == expected


def test_the_reader_multiplies_by_a_pre_quant_scale(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    source = source_of(tiny_checkpoint("gqa", **WIDE), RECIPES["int4"])
    write_hf(source, tmp_path, quiet)
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_torch

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.pre_quant_scale"][:] = 2
    save_torch(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    name = "model.layers.0.self_attn.o_proj.weight"
    expected = as_float(served_rows(source.rows, HF, "bf16")(CheckpointWeight((name,), INT4), 0, 128))
    stored = open_hf(tmp_path, source.config, source.recipe)
    np.testing.assert_array_equal(stored.rows(name, 0, 128), 2 * expected)
