"""Damaged checkpoints: every fault an ArtifactError that names file and tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.core.errors import ArtifactError
from exporter.core.recipe import Precision, Recipe
from targets.base import BuildSource, StoredModel
from targets.tensorrt_llm.compressed_form import write_compressed
from targets.tensorrt_llm.compressed_reader import open_compressed
from targets.tensorrt_llm.hf_form import write_hf
from targets.tensorrt_llm.hf_reader import open_hf
from tests.targets.tensorrt_llm.sources import FP8, INT4, NVFP4, W4A8, WIDE, quiet, recipe_of, source_of

Factory = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], object]
FILE = "model.safetensors"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
HF_RECIPES = {
    "fp8": recipe_of(FP8, "fp8"),
    "int4": recipe_of(INT4),
    "w4a8": recipe_of(W4A8),
    "nvfp4": recipe_of(NVFP4),
}
OTHER_RECIPES = {
    "fp8": recipe_of(FP8, "fp8"),
    "int4": recipe_of(Precision("int4", 32)),
    "nvfp4": recipe_of(NVFP4),
}


def assign(name: str, value: float) -> Edit:
    """Put one number into a tensor."""

    def edit(tensors: Tensors) -> None:
        tensor = tensors[name].clone()
        flat = tensor.view(-1) if tensor.dtype != torch.float8_e4m3fn else tensor.view(torch.uint8).view(-1)
        flat[0] = value
        tensors[name] = tensor

    return edit


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return edit


def without(name: str) -> Edit:
    return lambda tensors: tensors.pop(name)


def added(name: str) -> Edit:
    return lambda tensors: tensors.update({name: torch.zeros(2)})


HF_FAULTS: dict[str, tuple[str, Edit, str, str]] = {
    "zero scale": ("fp8", assign(f"{Q}.weight_scale", 0.0), "scale", f"{FILE}.*{Q}.weight_scale"),
    "NaN scale": ("fp8", assign(f"{Q}.input_scale", float("nan")), "not_finite", f"{FILE}.*{Q}.input_scale"),
    "negative scale": ("fp8", assign(f"{K}.weight_scale", -0.5), "scale", f"{FILE}.*{K}.weight_scale"),
    "negative cache scale": ("fp8", assign(f"{K}.k_scale", -0.5), "scale", f"{FILE}.*{K}.k_scale"),
    "NaN code": ("fp8", assign(f"{Q}.weight", 0x7F), "not_finite", f"{FILE}.*{Q}.weight"),
    "infinite scale": ("int4", assign(f"{Q}.weight_scale", float("inf")), "not_finite", f"{FILE}.*{Q}.weight_scale"),
    "negative group scale": ("int4", assign(f"{Q}.weight_scale", -1e-3), "scale", f"{FILE}.*{Q}.weight_scale"),
    "zero block scale": ("nvfp4", assign(f"{Q}.weight_scale", 0), "scale", f"{FILE}.*{Q}.weight_scale"),
    "negative block scale": ("nvfp4", assign(f"{Q}.weight_scale", 0x81), "scale", f"{FILE}.*{Q}.weight_scale"),
    "own matrix scale": ("nvfp4", assign(f"{K}.weight_scale_2", 0.5), "shared_scale", f"{FILE}.*{K}.weight_scale_2"),
    "own input scale": ("w4a8", assign(f"{K}.input_scale", 0.5), "shared_scale", f"{FILE}.*{K}.input_scale"),
    "quotient": ("w4a8", assign(f"{Q}.weight_scale", 1e9), "scale", f"{Q}.*float16"),
    "missing scale": ("fp8", without(f"{Q}.input_scale"), "tensor_missing", f"{Q}.input_scale"),
    "missing weight": ("int4", without("model.norm.weight"), "tensor_missing", "model.norm.weight"),
    "missing pre_quant_scale": (
        "int4",
        without("model.layers.0.mlp.down_proj.pre_quant_scale"),
        "tensor_missing",
        "down_proj.pre_quant_scale",
    ),
    "extra": ("fp8", added("model.layers.0.mlp.zeros"), "tensor_extra", "model.layers.0.mlp.zeros"),
    "shape": ("int4", replaced(f"{Q}.weight", torch.t), "tensor_shape", f"{FILE}.*{Q}.weight is U8"),
    "dtype": ("fp8", replaced(f"{Q}.weight_scale", torch.Tensor.bfloat16), "tensor_shape", f"{Q}.weight_scale is BF16"),
    "norm of NaN": ("fp8", assign("model.norm.weight", float("nan")), "not_finite", f"{FILE}.*model.norm.weight"),
}
OTHER_FAULTS: dict[str, tuple[str, Edit, str, str]] = {
    "zero scale": ("fp8", assign(f"{Q}.weight_scale", 0.0), "scale", f"{FILE}.*{Q}.weight_scale"),
    "negative scale": ("int4", assign(f"{Q}.weight_scale", -1.0), "scale", f"{FILE}.*{Q}.weight_scale"),
    "negative cache scale": (
        "fp8",
        assign("model.layers.0.self_attn.v_scale", -1.0),
        "scale",
        "model.layers.0.self_attn.v_scale",
    ),
    "global scale": ("nvfp4", assign(f"{K}.weight_global_scale", 7.0), "shared_scale", f"{K}.weight_global_scale"),
    "weight_shape": ("int4", assign(f"{Q}.weight_shape", 5), "tensor_shape", f"{Q}.weight_shape"),
    "missing": ("int4", without(f"{Q}.weight_packed"), "tensor_missing", f"{Q}.weight_packed"),
    "shape": ("nvfp4", replaced(f"{Q}.weight_scale", torch.t), "tensor_shape", f"{FILE}.*{Q}.weight_scale"),
}


def opened(path: Path, source: BuildSource) -> StoredModel:
    method = json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"]
    read: Any = open_hf if method == "modelopt" else open_compressed
    found: StoredModel = read(path, source.config, source.recipe)
    return found


def refused(path: Path, source: BuildSource, kind: str, match: str) -> None:
    with pytest.raises(ArtifactError, match=match) as caught:
        opened(path, source).validate()
    assert caught.value.kind == f"stored.{kind}" and caught.value.remedy and caught.value.exit_code == 5


def edited(path: Path, edit: Edit) -> None:
    tensors = load_file(path / FILE)
    edit(tensors)
    save_file(tensors, path / FILE, metadata={"format": "pt"})


def built(checkpoint: Path, out: Path, recipe: Recipe, write: Any = write_hf, **options: Any) -> BuildSource:
    source = source_of(checkpoint, recipe)
    write(source, out, quiet, **options)
    opened(out, source).validate()
    return source


@pytest.mark.parametrize("fault", list(HF_FAULTS))
def test_damaged_tensors_of_modelopt_s_form(tiny_checkpoint: Factory, tmp_path: Path, fault: str) -> None:
    recipe, edit, kind, match = HF_FAULTS[fault]
    source = built(tiny_checkpoint("gqa", **WIDE), tmp_path, HF_RECIPES[recipe])
    edited(tmp_path, edit)
    refused(tmp_path, source, kind, match)


@pytest.mark.parametrize("fault", list(OTHER_FAULTS))
def test_damaged_tensors_of_compressed_tensors(tiny_checkpoint: Factory, tmp_path: Path, fault: str) -> None:
    recipe, edit, kind, match = OTHER_FAULTS[fault]
    source = built(tiny_checkpoint("gqa", **WIDE), tmp_path, OTHER_RECIPES[recipe], write_compressed)
    edited(tmp_path, edit)
    refused(tmp_path, source, kind, match)


def test_scales_that_float16_does_not_hold(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    """TensorRT-LLM rounds the scales of groups to the model's type: here 1e-8 would become zero."""
    checkpoint = tiny_checkpoint("gqa", dtype=torch.float16, **WIDE)
    source = built(checkpoint, tmp_path, recipe_of(INT4, "fp16", "fp16"))
    edited(tmp_path, assign(f"{Q}.weight_scale", 1e-8))
    refused(tmp_path, source, "scale", "from 5.96046e-08 to 65504")


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def json_edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


INDEX = "model.safetensors.index.json"
FILES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated": (
        lambda path: shards(path)[1].write_bytes(shards(path)[1].read_bytes()[:-7]),
        "truncated",
        "model-00002",
    ),
    "trailing": (lambda path: shards(path)[0].open("ab").write(b"12"), "trailing", "model-00001"),
    "missing": (lambda path: shards(path)[2].unlink(), "shard_missing", "model-00003"),
    "stray": (lambda path: (path / "extra.safetensors").write_bytes(b""), "stray", "extra.safetensors"),
    "index names another shard": (
        lambda path: json_edit(
            path / INDEX, lambda v: v["weight_map"].update({"model.norm.weight": shards(path)[0].name})
        ),
        "index",
        "model.norm.weight",
    ),
    "index names a path": (
        lambda path: json_edit(
            path / INDEX, lambda v: v["weight_map"].update({"model.norm.weight": "../x.safetensors"})
        ),
        "index",
        "model.norm.weight",
    ),
    "index lies about the size": (
        lambda path: json_edit(path / INDEX, lambda v: v["metadata"].update(total_size=1)),
        "index",
        "total_size",
    ),
    "index is no JSON": (lambda path: (path / INDEX).write_text("{"), "json", INDEX),
    "other config": (
        lambda path: json_edit(path / "config.json", lambda v: v.update(rms_norm_eps=1e-3)),
        "config",
        "rms_norm_eps",
    ),
    "other algorithm": (
        lambda path: json_edit(path / "hf_quant_config.json", lambda v: v["quantization"].update(quant_algo="NVFP4")),
        "config",
        "disagree",
    ),
    "unknown algorithm": (
        lambda path: json_edit(path / "hf_quant_config.json", lambda v: v["quantization"].update(quant_algo="X")),
        "config",
        "'X'",
    ),
    "one description missing": (lambda path: (path / "hf_quant_config.json").unlink(), "config", "is missing"),
    "a matrix left out in both": (
        lambda path: [
            json_edit(path / "config.json", lambda v: v["quantization_config"]["ignore"].append(Q)),
            json_edit(path / "hf_quant_config.json", lambda v: v["quantization"]["exclude_modules"].append(Q)),
        ],
        "recipe",
        Q,
    ),
    "metadata": (
        lambda path: save_file(load_file(shards(path)[0]), shards(path)[0]),
        "metadata",
        "model-00001.*format",
    ),
}


@pytest.mark.parametrize("fault", list(FILES))
def test_damaged_files(tiny_checkpoint: Factory, tmp_path: Path, fault: str) -> None:
    damage, kind, match = FILES[fault]
    source = built(tiny_checkpoint("gqa", **WIDE), tmp_path, HF_RECIPES["fp8"], shard_bytes=120_000)
    assert len(shards(tmp_path)) > 2
    damage(tmp_path)
    refused(tmp_path, source, kind, match)


def test_another_recipe_than_the_files(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("gqa", **WIDE)
    built(checkpoint, tmp_path, HF_RECIPES["fp8"])
    for recipe in (recipe_of(FP8), HF_RECIPES["int4"]):
        refused(tmp_path, source_of(checkpoint, recipe), "recipe", "in the recipe")


def group(config: Any) -> Any:
    """The one group of a config.json."""
    return config["quantization_config"]["config_groups"]["group_0"]


HF_CONFIGS: dict[str, tuple[str, str, Callable[[Any], object], str]] = {
    "no model": ("fp8", "config.json", lambda c: c.pop("model_type"), "model_type"),
    "no architecture": ("fp8", "config.json", lambda c: c.update(architectures=[]), "architectures"),
    "other bits": ("fp8", "config.json", lambda c: group(c)["weights"].update(num_bits=4), "config_groups"),
    "other targets": ("nvfp4", "config.json", lambda c: group(c).update(targets=[]), "config_groups"),
    "other blocks": (
        "nvfp4",
        "config.json",
        lambda c: group(c)["input_activations"].update(group_size=32),
        "config_groups",
    ),
    "factors denied": (
        "w4a8",
        "hf_quant_config.json",
        lambda c: c["quantization"].update(pre_quant_scale=False),
        "pre_quant_scale",
    ),
}


@pytest.mark.parametrize("fault", list(HF_CONFIGS))
def test_configurations_of_modelopt_s_form_that_lie(tiny_checkpoint: Factory, tmp_path: Path, fault: str) -> None:
    name, file, change, match = HF_CONFIGS[fault]
    source = built(tiny_checkpoint("gqa", **WIDE), tmp_path, HF_RECIPES[name])
    json_edit(tmp_path / file, change)
    refused(tmp_path, source, "config", match)


OTHER_CONFIGS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "other bits": ("fp8", lambda c: group(c)["input_activations"].update(num_bits=4)),
    "scales that are not stored": ("fp8", lambda c: group(c)["input_activations"].update(dynamic=True)),
    "other blocks": ("nvfp4", lambda c: group(c)["input_activations"].update(group_size=32)),
    "unknown scales": ("nvfp4", lambda c: group(c)["input_activations"].update(dynamic="everywhere")),
    "inputs that were left alone": ("int4", lambda c: group(c).update(input_activations=FP8_TOKENS)),
}
FP8_TOKENS = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize("fault", list(OTHER_CONFIGS))
def test_configurations_of_compressed_tensors_that_lie(tiny_checkpoint: Factory, tmp_path: Path, fault: str) -> None:
    name, change = OTHER_CONFIGS[fault]
    source = built(tiny_checkpoint("gqa", **WIDE), tmp_path, OTHER_RECIPES[name], write_compressed)
    json_edit(tmp_path / "config.json", change)
    refused(tmp_path, source, "recipe", "disagree about the inputs")
