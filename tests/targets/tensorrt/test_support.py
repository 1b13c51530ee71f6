"""What the target says of recipes before any weight is read."""

from dataclasses import replace

import pytest

from calibration.presets import PRESETS, preset
from exporter.core.config import parse_config
from exporter.core.recipe import CHANNEL, KV_CACHES, Override, Precision, all_precisions
from targets.tensorrt.defaults import completed
from targets.tensorrt.formats import activation_rounding, arithmetic, rounds_inputs
from targets.tensorrt.support import capabilities, kv_cache_support, precision_support, recipe_support
from tests.support.tiny import BASE
from tests.targets.tensorrt.typed_engines import recipe_of

CONFIG = parse_config({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **BASE})
UNNAMED = frozenset({"lm_head", "embedding", "kv_cache", "linear", "group_size"})
REFUSED = {"fp32", "int4-rtn-asym", "nf4", "mxfp4"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_taken_or_refused_with_a_way_on(name):
    recipe = completed(preset(name), UNNAMED)
    support = recipe_support(CONFIG, recipe)
    assert support.usable == (name not in REFUSED), support
    if not support.usable:
        assert (support.why and "--recipe" in support.remedy) or "symmetric" in support.remedy


def test_the_table_has_every_cell():
    table = capabilities()
    assert set(table) == {p.describe() for p in all_precisions()} | {f"kv-cache {kind}" for kind in KV_CACHES}
    assert all(support.why and support.remedy for support in table.values() if not support.usable)
    assert all(support.why for support in table.values() if support.level == "emulated")


def test_refused_precisions():
    refused = {precision.kind for precision in all_precisions() if not precision_support(precision).usable}
    assert refused == {"fp32", "nf4", "mxfp4", "int4", "int8"}
    symmetric = [p for p in all_precisions() if p.kind in ("int4", "int8", "int6") and p.symmetric]
    assert all(precision_support(precision).usable for precision in symmetric)


@pytest.mark.parametrize("kind", ["fp32", "int8", "fp8"])
def test_caches_are_in_half_precision(kind):
    refused = recipe_support(CONFIG, replace(recipe_of(Precision("fp16")), kv_cache=kind))
    assert not refused.usable and "--kv-cache fp16" in refused.remedy
    assert kv_cache_support("bf16").usable
    assert kv_cache_support("bf16", "fp16").remedy == "use --kv-cache fp16"


def test_coded_embeddings_are_refused():
    refused = recipe_support(CONFIG, replace(recipe_of(Precision("fp16")), embedding=Precision("int8", 32)))
    assert not refused.usable and "--embedding fp16" in refused.remedy


@pytest.mark.parametrize(
    ("name", "capability", "words", "remedy"),
    [
        ("fp8", (8, 0), "SM80 cannot compute with fp8, SM89", "int8-smoothquant"),
        ("nvfp4", (8, 9), "SM89 cannot compute with nvfp4, SM100", "fp8"),
        ("bf16", (7, 5), "SM75 cannot compute with bf16, SM80", "fp16"),
        ("int4-awq", (7, 5), "SM75 cannot compute with int4, SM80", "fp16"),
        ("int8-smoothquant", (7, 5), "SM75 cannot compute with 8-bit inputs, SM80", "fp16"),
    ],
)
def test_an_sm_that_cannot_do_a_recipe_is_named(name, capability, words, remedy):
    refused = recipe_support(CONFIG, completed(preset(name), UNNAMED), capability)
    assert not refused.usable and words in refused.why and remedy in refused.remedy


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_remedies_work_on_that_sm(capability):
    for recipe in PRESETS:
        support = recipe_support(CONFIG, completed(preset(recipe), UNNAMED), capability)
        if not support.usable and "SM" in support.why:
            named = [name for name in PRESETS if name in support.remedy.replace(",", " ").split()]
            assert named
            for name in named:
                assert recipe_support(CONFIG, completed(preset(name), UNNAMED), capability).usable


@pytest.mark.parametrize("size", [8, 12, 20, 264, 512])
def test_heads_that_attention_does_not_take(size):
    refused = recipe_support(replace(CONFIG, head_dim=size), recipe_of(Precision("fp16")))
    assert not refused.usable and f"heads of {size}" in refused.why


def test_rows_without_a_block_are_refused():
    config = replace(CONFIG, hidden_size=100)
    assert not recipe_support(config, recipe_of(Precision("int4", CHANNEL))).usable
    assert recipe_support(config, recipe_of(Precision("fp8", CHANNEL))).usable


def test_head_embedding_and_cache_get_the_type_of_arithmetic():
    found = completed(preset("fp8"), UNNAMED)
    assert (found.lm_head.kind, found.embedding.kind, found.kv_cache) == ("fp16", "fp16", "fp16")
    assert {precision.kind for precision in found.precisions} == {"fp16", "fp8"}
    assert arithmetic(found) == "fp16"
    found = completed(preset("bf16"), UNNAMED)
    assert (found.lm_head.kind, found.embedding.kind, found.kv_cache) == ("bf16", "bf16", "bf16")
    assert arithmetic(found) == "bf16"


def test_what_was_named_stays():
    named = replace(preset("int4-awq"), lm_head=Precision("int4", 32), kv_cache="fp16")
    found = completed(named, frozenset({"embedding"}))
    assert (found.lm_head, found.embedding.kind, found.kv_cache) == (Precision("int4", 32), "fp16", "fp16")
    assert completed(replace(named, lm_head=Precision("bf16")), frozenset({"embedding"})).embedding.kind == "bf16"
    named = replace(named, overrides=(Override("layers.0.*", Precision("bf16")),))
    assert completed(named, UNNAMED - {"linear"}).lm_head.kind == "bf16"
    assert completed(replace(named, kv_cache="bf16"), UNNAMED - {"kv_cache"}).lm_head.kind == "bf16"


def test_inputs_are_rounded_where_codes_are_multiplied():
    rounding = {p.describe(): activation_rounding(p) for p in all_precisions() if p.activations}
    assert rounding["fp8/tensor+fp8/tensor"] == "fp8-tensor"
    assert rounding["int8/channel+int8/token"] == "token"
    assert rounding["nvfp4+nvfp4/tensor"] == "nvfp4"
    assert (
        rounding["int4/g128+int8/token"] is rounding["int4/g128+fp8/tensor"] is rounding["int8/g32+int8/token"] is None
    )
    assert not any(rounds_inputs(p) for p in all_precisions() if not p.activations)
