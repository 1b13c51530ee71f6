"""What is found wrong with TensorRT-LLM checkpoints: every defect is an ArtifactError that names file and tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.core.errors import ArtifactError
from targets.base import BuildSource
from targets.tensorrt_llm.loader_rounding import rounded_by_loader
from targets.tensorrt_llm.trtllm_checks import expected_tensors, read_stored_config
from targets.tensorrt_llm.trtllm_reader import open_trtllm
from tests.support.tiny import write_checkpoint
from tests.targets.tensorrt_llm.trtllm_sources import PRECISIONS, SHAPE, recipe_of, reopened, source_of, written

LAYER = "transformer.layers.0"
QKV, DENSE = f"{LAYER}.attention.qkv", f"{LAYER}.attention.dense"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> BuildSource:
    """FP8 with an FP8 cache, cut in two, a head of keys on two ranks."""
    shape = {**SHAPE, "num_key_value_heads": 1}
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("llama"), "biases", **shape)
    return source_of(checkpoint, recipe_of("FP8", "fp8"), 2)


@pytest.fixture(scope="module")
def built(source: BuildSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    written(source, out)
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "out"))


def found(source: BuildSource, path: Path) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        open_trtllm(path, source.config, source.recipe).validate()
    assert caught.value.remedy
    return caught.value


def change(path: Path, rank: int, edit: Callable[[Tensors], Any]) -> None:
    file = path / f"rank{rank}.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def set_to(name: str, value: float) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: torch.full_like(tensors[name], value)})


def test_what_is_written_is_valid(source: BuildSource, built: Path) -> None:
    open_trtllm(built, source.config, source.recipe).validate()


@pytest.mark.parametrize("value", [0.0, -0.01, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        f"{QKV}.weights_scaling_factor",
        f"{DENSE}.activation_scaling_factor",
        f"{LAYER}.attention.v_cache_scaling_factor",
    ],
)
def test_scales_are_positive_and_finite(source: BuildSource, copy: Path, name: str, value: float) -> None:
    for rank in (0, 1):
        change(copy, rank, set_to(name, value))
    error = found(source, copy)
    assert error.kind == "stored.scale"
    assert name in error.message and "rank0" in error.message


DEFECTS: dict[str, tuple[int, Callable[[Tensors], Any], str, str]] = {
    "missing": (
        1,
        lambda t: t.pop(f"{DENSE}.weight"),
        "stored.tensor_missing",
        f"rank1.safetensors lacks '{DENSE}.weight'",
    ),
    "extra": (0, lambda t: t.update({"lm_head.bias": torch.ones(1)}), "stored.tensor_extra", "lm_head.bias"),
    "shape": (
        0,
        lambda t: t.update({f"{LAYER}.mlp.fc.weight": t[f"{LAYER}.mlp.fc.weight"][:8]}),
        "stored.shape",
        "[8, 256]",
    ),
    "dtype": (0, lambda t: t.update({f"{QKV}.weight": t[f"{QKV}.weight"].half()}), "stored.shape", "float8_e4m3fn"),
    "norm of one rank": (1, set_to(f"{LAYER}.input_layernorm.weight", 2.0), "stored.replica", "input_layernorm"),
    "bias of one rank": (1, set_to(f"{DENSE}.bias", 2.0), "stored.replica", f"{DENSE}.bias"),
    "scale of one rank": (1, set_to(f"{QKV}.activation_scaling_factor", 2.0), "stored.replica", "activation_scaling"),
    "repeated keys": (1, lambda t: t[f"{QKV}.weight"][-1].fill_(0), "stored.replica", f"{QKV}.weight"),
    "repeated biases": (1, lambda t: t[f"{QKV}.bias"][-1].fill_(0), "stored.replica", f"{QKV}.bias"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_tensors_that_do_not_belong(source: BuildSource, copy: Path, defect: str) -> None:
    rank, edit, kind, told = DEFECTS[defect]
    change(copy, rank, edit)
    error = found(source, copy)
    assert error.kind == kind
    assert told in error.message


def test_a_rank_file_is_missing(source: BuildSource, copy: Path) -> None:
    (copy / "rank1.safetensors").unlink()
    error = found(source, copy)
    assert error.kind == "stored.rank_missing" and "1 of 2 rank files are missing: rank1.safetensors" in error.message


def test_a_rank_file_too_many(source: BuildSource, copy: Path) -> None:
    shutil.copy(copy / "rank1.safetensors", copy / "rank2.safetensors")
    assert found(source, copy).kind == "stored.rank_extra"


def test_a_truncated_rank_file(source: BuildSource, copy: Path) -> None:
    file = copy / "rank0.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    error = found(source, copy)
    assert error.kind == "stored.file" and "rank0.safetensors" in error.message


def test_ranks_in_each_others_place(tmp_path: Path) -> None:
    """Two stages are told apart by what only one of them has."""
    source = source_of(write_checkpoint(tmp_path / "llama", **SHAPE), recipe_of("bf16"), 1, 2)
    written(source, tmp_path / "out")
    first, second = (tmp_path / "out" / f"rank{rank}.safetensors" for rank in (0, 1))
    first.rename(tmp_path / "other")
    second.rename(first)
    (tmp_path / "other").rename(second)
    assert found(source, tmp_path / "out").kind == "stored.tensor_missing"


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another world": (lambda c: c["mapping"].update(world_size=4), "stored.mapping"),
    "another cut": (lambda c: c.update(mapping={"world_size": 2, "tp_size": 1, "pp_size": 2}), "stored.tensor_extra"),
    "uneven heads": (lambda c: c.update(num_attention_heads=7), "stored.mapping"),
    "too many stages": (
        lambda c: c.update(num_hidden_layers=1, mapping={"world_size": 2, "tp_size": 1, "pp_size": 2}),
        "stored.mapping",
    ),
    "no mapping": (lambda c: c.pop("mapping"), "stored.config"),
    "another algorithm": (lambda c: c["quantization"].update(quant_algo="NVFP4"), "stored.config"),
    "no algorithm": (lambda c: c["quantization"].update(quant_algo=None), "stored.tensor_extra"),
    "another type": (lambda c: c.update(dtype="float8"), "stored.config"),
    "another size": (lambda c: c.update(hidden_size=128), "stored.config"),
    "a size that is no number": (lambda c: c.update(hidden_size="256"), "stored.config"),
    "another architecture": (lambda c: c.update(architecture="GPTForCausalLM"), "stored.config"),
    "no rotary base": (lambda c: c.update(rotary_base=10001.0), "stored.config"),
    "another rotary scaling": (lambda c: c.update(rotary_scaling={"type": "linear", "factor": 2.0}), "stored.config"),
    "no bias": (lambda c: c.update(attn_bias=False), "stored.config"),
    "another norm": (lambda c: c.update(norm_epsilon=1e-5), "stored.config"),
    "another rotary": (lambda c: c.update(position_embedding_type="learned_absolute"), "stored.config"),
    "half a rotary": (lambda c: c.update(rotary_pct=0.5), "stored.config"),
    "whole embeddings": (lambda c: c.update(use_parallel_embedding=False), "stored.config"),
    "another cut of embeddings": (lambda c: c.update(embedding_sharding_dim=1), "stored.config"),
    "a quantized head": (lambda c: c["quantization"].update(exclude_modules=[]), "stored.config"),
    "modules in one text": (lambda c: c["quantization"].update(exclude_modules="lm_head"), "stored.config"),
    "no cache": (lambda c: c["quantization"].update(kv_cache_quant_algo=None), "stored.tensor_extra"),
}


@pytest.mark.parametrize("defect", CONFIGS)
def test_a_config_that_lies(source: BuildSource, copy: Path, defect: str) -> None:
    edit, kind = CONFIGS[defect]
    config = json.loads((copy / "config.json").read_text())
    edit(config)
    (copy / "config.json").write_text(json.dumps(config))
    assert found(source, copy).kind == kind


@pytest.mark.parametrize("text", ["", "[]", '{"architecture": NaN}'])
def test_a_config_that_is_none(source: BuildSource, copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    assert found(source, copy).kind == "stored.config"


def test_codes_that_are_no_numbers_are_found_where_they_are_read(source: BuildSource, copy: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{LAYER}.mlp.proj.weight"].view(torch.uint8)[3, 5] = 0x7F

    change(copy, 1, spoil)
    stored = open_trtllm(copy, source.config, source.recipe)
    stored.validate()
    with pytest.raises(ArtifactError, match=r"model\.layers\.0\.mlp\.down_proj\.weight holds NaN") as caught:
        stored.rows("model.layers.0.mlp.down_proj.weight", 0, 8)
    assert caught.value.kind == "stored.not_finite"


@pytest.mark.parametrize("name", PRECISIONS)
def test_names_types_and_shapes_as_torch_reads_them(tmp_path: Path, name: str) -> None:
    """The list that config.json implies against the safetensors library's view of the files."""
    source = source_of(write_checkpoint(tmp_path / "llama", **SHAPE), recipe_of(name, "int8"), 2)
    written(source, tmp_path / "out")
    reopened(source, tmp_path / "out")
    stored = read_stored_config(tmp_path / "out")
    for rank in (0, 1):
        tensors = load_file(tmp_path / "out" / f"rank{rank}.safetensors")
        seen = {key: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for key, tensor in tensors.items()}
        assert seen == expected_tensors(stored, rank)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_loaders_rounding(bits: int) -> None:
    """Halves away from zero, the largest value one code short on the positive side."""
    top = 2.0 ** (bits - 1)
    values = np.array([[top, -top, 0.5, -0.5, 1.5, 0.49]], np.float32)
    wanted = np.array([[top - 1, -top, 1.0, -1.0, 2.0, 0.0]], np.float32)
    np.testing.assert_array_equal(rounded_by_loader(values, bits).dequantize(), wanted)
    np.testing.assert_array_equal(rounded_by_loader(np.zeros((1, 3), np.float32), bits).dequantize(), 0)
