"""What each form takes of a recipe, and what is chosen where nobody names a part."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.presets import PRESETS, preset
from exporter.core.config import ModelConfig
from exporter.core.engine_options import EngineOptions
from exporter.core.recipe import CHANNEL, KV_CACHES, TENSOR, Override, Precision, Recipe, all_precisions
from targets.tensorrt_llm.defaults import completed
from targets.tensorrt_llm.formats import (
    FORMS,
    checkpoint_kind,
    compressed_format,
    float_kind,
    hf_algorithm,
    legacy_algorithm,
    matrix_bits,
)
from targets.tensorrt_llm.support import capabilities, kv_cache_support, precision_support, recipe_support
from tests.targets.tensorrt_llm.sources import FP8, FP8_CHANNEL, INT4, NVFP4, W4A8, W8A8, WIDE, recipe_of

Factory = Callable[..., Path]
UNNAMED = frozenset({"lm_head", "embedding", "kv_cache", "linear", "group_size"})
HF, LEGACY, COMPRESSED = (EngineOptions(format=form) for form in FORMS)
TAKEN = {
    "hf": {"fp8/tensor+fp8/tensor", "fp8/channel+fp8/token", "nvfp4+nvfp4/tensor", "int4/g64", "int4/g128"}
    | {"int4/g128+fp8/tensor"},
    "trtllm": {"fp8/tensor+fp8/tensor", "fp8/channel+fp8/token", "int4/g64", "int4/g128", "int4/g128+fp8/tensor"}
    | {"int4/channel", "int8/channel", "int8/channel+int8/token", "int8/channel+int8/tensor"},
    "compressed-tensors": {"fp8/tensor+fp8/tensor", "fp8/channel+fp8/token", "nvfp4", "nvfp4+nvfp4/tensor"}
    | {"int8/channel+int8/token", "int8/channel+int8/tensor"}
    | {f"{kind}/{group}" for kind in ("int4", "int8") for group in ("g32", "g64", "g128", "channel")},
}


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Factory) -> ModelConfig:
    return ModelConfig.from_directory(tiny_checkpoint("gqa", **WIDE))


@pytest.mark.parametrize("form", FORMS)
def test_every_precision_is_taken_or_refused_with_a_reason(form: str) -> None:
    for precision in all_precisions():
        found = precision_support(precision, form)
        if precision.kind in ("bf16", "fp16") or precision.describe() in TAKEN[form]:
            assert found.usable, precision.describe()
        else:
            assert not found.usable and found.why and found.remedy, precision.describe()


def test_the_table_has_every_precision_and_cache() -> None:
    table = capabilities()
    assert set(table) == {p.describe() for p in all_precisions()} | {f"kv-cache {kind}" for kind in KV_CACHES}
    assert "--format" in table["int8/channel+int8/token"].why and "--format" not in table["fp8/tensor+fp8/tensor"].why


@pytest.mark.parametrize(("kind", "forms"), [("fp8", FORMS), ("int8", ("trtllm",)), ("bf16", FORMS), ("fp32", ())])
def test_caches(kind: str, forms: tuple[str, ...]) -> None:
    assert [form for form in FORMS if kv_cache_support(kind, form).usable] == list(forms)


REFUSED: dict[str, tuple[Recipe, EngineOptions, str]] = {
    "head": (replace(recipe_of(FP8), lm_head=INT4), HF, "lm-head in int4"),
    "embedding": (replace(recipe_of(FP8), embedding=Precision("fp32")), HF, "embedding in fp32"),
    "cache type": (recipe_of(FP8, "fp16"), HF, "KV cache in fp16"),
    "cache of floats": (recipe_of(Precision("bf16"), "fp8"), HF, "vLLM"),
    "fp32": (recipe_of(Precision("fp32"), kind="fp32"), HF, "16 bits"),
    "two algorithms": (recipe_of(FP8, overrides=(Override("layers.1.*", INT4),)), HF, "one precision"),
    "smoothquant": (recipe_of(W8A8), HF, "SmoothQuant"),
    "zero points": (recipe_of(Precision("int4", 128, symmetric=False)), HF, "zero points"),
    "group": (recipe_of(Precision("int4", 32)), HF, "64 or 128"),
    "w4a8 group": (recipe_of(Precision("int4", 64, activations="fp8/tensor")), HF, "groups of 128"),
    "nvfp4 in shards": (recipe_of(NVFP4), LEGACY, "nvfp4"),
    "weights of nvfp4 alone": (recipe_of(Precision("nvfp4", 16)), HF, "nvfp4"),
    "tp": (recipe_of(FP8), EngineOptions(tensor_parallel=2), "never cut"),
    "pp": (recipe_of(FP8), EngineOptions(pipeline_parallel=2, format="compressed-tensors"), "never cut"),
    "heads": (recipe_of(FP8), EngineOptions(tensor_parallel=3, format="trtllm"), "4 heads"),
    "form": (recipe_of(FP8), EngineOptions(format="gguf"), "gguf"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_before_any_work(config: ModelConfig, name: str) -> None:
    recipe, engine, match = REFUSED[name]
    found = recipe_support(config, recipe, engine)
    assert not found.usable and match in found.why and found.remedy, found


def test_odd_rows_cannot_be_packed_in_pairs(config: ModelConfig) -> None:
    odd = replace(config, intermediate_size=257)
    assert "257" in recipe_support(odd, recipe_of(INT4)).why
    assert recipe_support(odd, recipe_of(FP8)).usable


@pytest.mark.parametrize("recipe", [FP8, FP8_CHANNEL, INT4, W4A8, NVFP4, Precision("bf16")], ids=Precision.describe)
def test_taken(config: ModelConfig, recipe: Precision) -> None:
    left_out = (Override("layers.1.*", Precision("bf16")),) if recipe.is_coded else ()
    assert recipe_support(config, recipe_of(recipe, "fp8" if recipe.is_coded else "bf16", overrides=left_out)).usable


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("form", FORMS)
def test_presets_are_completed_to_something_the_form_takes(config: ModelConfig, name: str, form: str) -> None:
    """or refused: kinds that no server knows, and mixtures."""
    engine = EngineOptions(format=form)
    recipe = completed(preset(name), UNNAMED, config, engine)
    found = recipe_support(config, recipe, engine)
    refused = {
        "hf": {"auto", "fp32", "int8-weight", "int8-smoothquant", "int4-rtn-asym", "nf4", "mxfp4"},
        "trtllm": {"auto", "fp32", "int4-rtn-asym", "nf4", "mxfp4", "nvfp4"},
        "compressed-tensors": {"auto", "fp32", "int4-rtn-asym", "nf4", "mxfp4", "w4a8"},
    }[form]
    assert found.usable == (name not in refused), found
    if found.usable and recipe.linear.is_coded:
        assert recipe.kv_cache == recipe.lm_head.kind == recipe.embedding.kind == "bf16"


def test_groups_that_nobody_named_fit_the_widths(tiny_checkpoint: Factory) -> None:
    for changes, expected in (({}, 64), (WIDE, 128), ({"hidden_size": 96, "head_dim": 32}, 128)):
        config = ModelConfig.from_directory(tiny_checkpoint("gqa", **changes))
        assert completed(preset("int4-awq"), UNNAMED, config).linear == Precision("int4", expected)
    config = ModelConfig.from_directory(tiny_checkpoint("gqa", hidden_size=96, head_dim=32))
    assert completed(preset("int4-awq"), UNNAMED, config, COMPRESSED).linear == Precision("int4", 32)
    assert completed(preset("int4-awq"), UNNAMED).linear == Precision("int4", 128)


def test_what_is_named_stays(config: ModelConfig) -> None:
    recipe = replace(preset("int4-awq"), kv_cache="fp8")
    assert completed(recipe, frozenset(), config) == recipe
    assert completed(recipe, frozenset({"lm_head"}), config).embedding == recipe.embedding


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ({"dtype": "bfloat16"}, "bf16"),
        ({"torch_dtype": "float16"}, "fp16"),
        ({"torch_dtype": "torch.float16"}, "fp16"),
        ({"dtype": "float32"}, "bf16"),
        ({}, "bf16"),
    ],
)
def test_the_type_of_floats(config: ModelConfig, raw: dict[str, str], kind: str) -> None:
    other = replace(config, raw=raw)
    assert checkpoint_kind(other) == float_kind(other, recipe_of(FP8)) == kind
    assert float_kind(other, recipe_of(Precision("fp16"))) == "fp16"


def test_names_of_algorithms() -> None:
    assert hf_algorithm(W4A8) == legacy_algorithm(W4A8) == "W4A8_AWQ"
    assert legacy_algorithm(W8A8) == "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
    assert compressed_format(Precision("fp8", TENSOR)) is None
    assert compressed_format(Precision("int8", CHANNEL)) == "pack-quantized"


@pytest.mark.parametrize(
    ("precision", "bits"),
    [
        (Precision("bf16"), 16 * 4096 * 512),
        (Precision("fp32"), 16 * 4096 * 512),
        (FP8, 8 * 4096 * 512 + 32 + 64),
        (FP8_CHANNEL, 8 * 4096 * 512 + 32 * 4096 + 64),
        (INT4, 4 * 4096 * 512 + 32 * 4096 * 4 + 64),
        (Precision("int4", 32), 4 * 4096 * 512 + 16 * 4096 * 16 + 64),
        (NVFP4, 4 * 4096 * 512 + 8 * 4096 * 32 + 64),
    ],
    ids=lambda value: value.describe() if isinstance(value, Precision) else "",
)
def test_bits_of_a_matrix(precision: Precision, bits: int) -> None:
    assert matrix_bits(precision, 4096, 512) == bits


def test_remedies_for_caches_are_taken(config: ModelConfig) -> None:
    """An fp8 cache is offered only where it would be accepted."""
    for name, engine, offered in (("bf16", HF, False), ("fp8", HF, True), ("bf16", LEGACY, True)):
        recipe = completed(replace(preset(name), kv_cache="fp16"), UNNAMED - {"kv_cache"}, config, engine)
        found = recipe_support(config, recipe, engine)
        assert not found.usable and ("--kv-cache fp8" in found.remedy) == offered
        assert recipe_support(config, replace(recipe, kv_cache="fp8"), engine).usable == offered
