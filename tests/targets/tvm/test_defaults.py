"""What the target chooses where nobody did."""

import pytest

from calibration.presets import PRESETS, load_recipe, preset
from exporter.core.recipe import CHANNEL, Precision, Recipe
from targets.registry import get_target

TVM = get_target("tvm")
EVERYTHING = frozenset({"lm_head", "embedding", "kv_cache"})
FP32, INT8 = Precision(), Precision("int8", 32)


@pytest.mark.parametrize("name", PRESETS)
def test_the_cache_is_no_finer_than_the_weights(name):
    expected = "fp32" if name in ("fp32", "bf16") else "fp16"
    assert TVM.complete(preset(name), EVERYTHING).kv_cache == expected


def test_integers_in_any_part_make_the_cache_fp16():
    assert TVM.complete(Recipe("r", FP32, FP32, INT8), frozenset({"kv_cache"})).kv_cache == "fp16"


@pytest.mark.parametrize("name", ["int4-rtn", "int4-rtn-asym"])
@pytest.mark.parametrize("group", [32, 128])
def test_heads_of_4_bits_become_one_table_of_6(name, group):
    recipe = load_recipe(name, group_size=group, complete=TVM.complete)
    assert recipe.lm_head == recipe.embedding == Precision("int6", group)
    assert recipe.linear == load_recipe(name, group_size=group).linear


@pytest.mark.parametrize(
    ("head", "six"),
    [
        (Precision("int4", CHANNEL, activations="int8/token"), Precision("int6", 32, activations="int8/token")),
        (Precision("nf4", 64), Precision("int6", 64)),
        (Precision("nvfp4", 16), Precision("int6", 16)),
        (Precision("mxfp4", 32), Precision("int6", 32)),
    ],
)
def test_other_heads_of_4_bits_too(head, six):
    recipe = TVM.complete(Recipe("r", head, head, INT8), EVERYTHING)
    assert (recipe.linear, recipe.lm_head, recipe.embedding) == (head, six, six.weight_only)


@pytest.mark.parametrize(
    "named", [{"lm_head": "int4"}, {"embedding": "int8"}, {"lm_head": "int8", "embedding": "int4"}]
)
def test_named_parts_and_other_recipes_stay(named, tmp_path):
    plain, file = load_recipe("int4-rtn", **named), tmp_path / "r.toml"
    parts = ((part, *text.split("/")) for part, text in named.items())
    file.write_text("".join(f'[{part}]\nkind = "{kind}"\n' for part, kind in parts), encoding="utf-8")
    for source, options in (("int4-rtn", named), (file, {})):
        found = load_recipe(source, complete=TVM.complete, **options)
        assert (found.linear, found.lm_head, found.embedding) == (plain.linear, plain.lm_head, plain.embedding)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "int8-weight", "int8-smoothquant", "fp8", "nvfp4", "mxfp4"])
def test_other_heads_stay(name):
    recipe = preset(name)
    assert TVM.complete(recipe, EVERYTHING - {"kv_cache"}) == recipe


def test_onnxruntime_takes_recipes_as_they_are():
    for name in PRESETS:
        assert get_target("onnxruntime").complete(preset(name), EVERYTHING) == preset(name)
