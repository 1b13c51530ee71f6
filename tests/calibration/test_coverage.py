"""Coverage from the config alone: sums written out by hand, the gate, and agreement with what is inserted."""

from dataclasses import replace
from functools import partial

import pytest

from calibration.auto import CANDIDATES
from calibration.coverage import AUTO_GROUPS, coverage, gate, kernel_group, plain_matrix_bits, prospective
from calibration.presets import PRESETS, load_recipe, parse_precision
from exporter.core.config import ModelConfig, parse_config
from exporter.core.errors import BudgetError, InputError
from exporter.core.recipe import Override, Precision, Recipe
from targets.registry import get_target
from tests.support.tiny import BASE

LAYER = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128  # q, k and v, o, gate and up and down
TABLE = 320 * 64


def config(**changes: object) -> ModelConfig:
    return parse_config({**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", **changes})


def test_every_matrix_is_listed_once() -> None:
    found = coverage(config(), load_recipe("int4-rtn"))
    names = [t.name for t in found.tensors]
    expected = [name for name, shape in config().tensor_shapes.items() if len(shape) == 2]
    assert sorted(names) == sorted(expected) and len(set(names)) == len(names)
    assert sum(t.parameters for t in found.tensors) == 2 * LAYER + 2 * TABLE
    assert found.fraction == 1.0 and all(t.why == "" for t in found.tensors)


@pytest.mark.parametrize(
    ("recipe", "group", "bits"),
    [("fp32", None, 32.0), ("bf16", None, 16.0), ("int8-weight", 32, 9.0), ("int8-weight", 64, 8.5)],
)
def test_bits_per_weight_of_uniform_recipes(recipe: str, group: int | None, bits: float) -> None:
    for tied in (False, True):
        found = coverage(config(tie_word_embeddings=tied), load_recipe(recipe, group_size=group))
        assert found.bits_per_weight == pytest.approx(bits, rel=1e-12)


def test_bits_per_weight_counts_scales_and_zero_points() -> None:
    recipe = load_recipe("int4-rtn-asym", lm_head="int4", embedding="int4/g32/asym")
    asymmetric, symmetric = 4 + (32 + 4) / 32, 4 + 32 / 32
    expected = (asymmetric * (2 * LAYER + TABLE) + symmetric * TABLE) / (2 * LAYER + 2 * TABLE)
    assert coverage(config(), recipe).bits_per_weight == pytest.approx(expected, rel=1e-12)
    halves = partial(plain_matrix_bits, scale_bits=16)
    assert coverage(config(), load_recipe("int4-rtn", embedding="int4"), halves).bits_per_weight == 4.5
    six = load_recipe("int8-weight", lm_head="int6/g64", embedding="int6/g64")
    expected = ((8 + 32 / 32) * 2 * LAYER + (6 + 32 / 64) * 2 * TABLE) / (2 * LAYER + 2 * TABLE)
    assert coverage(config(), six).bits_per_weight == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "onnxruntime", "tvm"),
    [
        ("int6/g64", 8 + 32 / 64, 6 + 16 / 64),
        ("int4/g64/asym", 4 + (32 + 8) / 64, 4 + (16 + 8) / 64),
        ("int4/g32/asym", 4 + (32 + 4) / 32, 4 + (16 + 8) / 32),
        ("int8/channel", 8 + 32 / 64, 8 + 16 / 64),
        ("fp8/tensor", 8 + 32 / 64, 8 + 32 / 64),
        ("fp8/channel", 8 + 32 / 64, 8 + 32 / 64),
        ("nf4/g32", 4 + 32 / 32, 4 + 16 / 32),
        ("nvfp4", 8 + 32 / 16, 4 + 8 / 16 + 32 / 64),
        ("mxfp4", 8 + 32 / 32, 4 + 8 / 32),
        ("bf16", 16, 16),
    ],
)
def test_bits_are_those_that_a_target_stores(text: str, onnxruntime: float, tvm: float) -> None:
    """Rows of 64; zero points take whole bytes of a row (onnxruntime), or a byte each (tvm)."""
    each, square = parse_precision(text), config(intermediate_size=64)
    for target, bits in (("onnxruntime", onnxruntime), ("tvm", tvm)):
        found = coverage(square, Recipe("r", each, each, each), get_target(target).matrix_bits)
        assert found.bits_per_weight == pytest.approx(bits, rel=1e-12), target


def test_a_row_of_one_scale_repeats_it_for_each_group_of_the_kernels() -> None:
    """Rows of 96 are cut into groups of 32, rows of 512 into groups of 256."""
    found = {width: get_target("onnxruntime").matrix_bits(Precision("int8", -1), 10, width) for width in (96, 512)}
    assert found == {96: 10 * (8 * 96 + 3 * 32), 512: 10 * (8 * 512 + 2 * 32)}
    assert get_target("tvm").matrix_bits(Precision("int4", -1, False), 10, 512) == 10 * (4 * 512 + 2 * (16 + 8))


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("int8/channel", 8 + 32 / 64),
        ("int8/channel/asym", 8 + (32 + 8) / 64),
        ("fp8/channel", 8 + 32 / 64),
        ("fp8/tensor", 8 + 32 / (64 * 64)),
        ("nf4/g32", 4 + 32 / 32),
        ("nvfp4", 4 + 8 / 16 + 32 / (64 * 64)),
        ("mxfp4", 4 + 8 / 32),
        ("int4/g16+int8/token", 4 + 32 / 16),
    ],
)
def test_bits_of_one_matrix(text: str, bits: float) -> None:
    """The formats' own scales where they have some, else 32 bits each."""
    assert plain_matrix_bits(parse_precision(text), 64, 64) == bits * 64 * 64


@pytest.mark.parametrize(
    ("text", "width", "group"),
    [("int4/g32", 96, 32), ("int8/channel", 2048, 256), ("int4/channel", 96, 32), ("fp8/tensor", 176, 16),
     ("int8/channel", 24, 0), ("mxfp4", 2048, 32)],
)  # fmt: skip
def test_groups_of_kernels(text: str, width: int, group: int) -> None:
    assert kernel_group(parse_precision(text), width) == group


def overridden(*overrides: tuple[str, str]) -> Recipe:
    found = tuple(Override(pattern, parse_precision(text)) for pattern, text in overrides)
    return replace(load_recipe("int4-rtn"), overrides=found)


def test_overrides_hold_for_the_layers_they_match() -> None:
    recipe = overridden(("layers.*.mlp.*", "int8/g32"), ("layers.1.mlp.down_proj", "nf4/g64"), ("*.o_proj", "bf16"))
    found = {t.name: t.requested.describe() for t in coverage(config(), recipe).tensors}
    assert found["model.layers.0.mlp.up_proj.weight"] == found["model.layers.0.mlp.down_proj.weight"] == "int8/g32"
    assert found["model.layers.1.mlp.down_proj.weight"] == "nf4/g64"
    assert found["model.layers.1.self_attn.o_proj.weight"] == "bf16"
    assert found["model.layers.1.self_attn.q_proj.weight"] == found["lm_head.weight"] == "int4/g32"


def test_matrices_computed_together_must_agree() -> None:
    recipe = overridden(("layers.1.self_attn.k_proj", "int8/g32"), ("*.up_proj", "int4/g32+int8/token"))
    with pytest.raises(InputError) as caught:
        coverage(config(), recipe)
    assert caught.value.kind == "recipe.packs" and caught.value.exit_code == 2
    for part in ("layers.1: self_attn.q_proj int4/g32, self_attn.k_proj int8/g32", "layers.0: mlp.gate_proj int4/g32,"):
        assert part in caught.value.message
    together = overridden(("layers.1.self_attn.[qkv]_proj", "int8/g32"), ("layers.*.mlp.[gu]*", "int4/g64"))
    assert coverage(config(), together).fraction == 1.0


def test_overrides_that_match_nothing_are_named() -> None:
    recipe = overridden(("layers.2.*", "int8/g32"), ("model.layers.0.*", "int8/g32"), ("layers.0.*", "int8/g32"))
    with pytest.raises(InputError, match="matched by") as caught:
        coverage(config(), recipe)
    assert caught.value.kind == "recipe.overrides" and "'layers.2.*', 'model.layers.0.*'" in caught.value.message
    assert "'layers.0.*'" not in caught.value.message and "layers.0.self_attn.q_proj" in caught.value.remedy


def test_the_gate_of_formats_with_fixed_groups() -> None:
    """Hidden states of 72: neither 16 nor 32 divides them, and no --group-size helps."""
    recipe = replace(load_recipe("nvfp4"), lm_head=parse_precision("mxfp4"))
    with pytest.raises(BudgetError, match="K=72 not divisible by 16") as caught:
        gate(coverage(config(hidden_size=72), recipe))
    assert "K=72 not divisible by 32" in caught.value.message
    assert "another precision than mxfp4 and nvfp4" in caught.value.remedy


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_covers_a_plain_llama(name: str) -> None:
    found = coverage(config(hidden_size=128), load_recipe(name))
    assert found.fraction == 1.0 and all(t.actual == t.requested for t in found.tensors)


def test_a_tied_table_is_stored_once_when_both_uses_agree() -> None:
    tied = config(tie_word_embeddings=True)
    shared = coverage(tied, load_recipe("int4-rtn", embedding="int4")).bits_per_weight
    apart = coverage(tied, load_recipe("int4-rtn", embedding="int8")).bits_per_weight
    assert shared == pytest.approx(5.0)
    rounding = replace(load_recipe("int4-rtn", embedding="int4"), lm_head=parse_precision("int4/g32+int8/token"))
    assert coverage(tied, rounding).bits_per_weight == shared, "what the head's input becomes takes no bytes"
    assert apart == pytest.approx((5 * (2 * LAYER + TABLE) + 9 * TABLE) / (2 * LAYER + TABLE))


def test_a_width_that_groups_do_not_divide_stays_fp32_and_lowers_the_fraction() -> None:
    found = coverage(config(intermediate_size=176), load_recipe("int4-rtn", group_size=64))
    left = [t for t in found.tensors if not t.covered]
    assert [t.name for t in left] == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    assert {t.actual.describe() for t in left} == {"fp32"} and {t.why for t in left} == {"K=176 not divisible by 64"}
    missed = 2 * 64 * 176
    total = 2 * (LAYER + 3 * 64 * (176 - 128)) + 2 * TABLE
    assert found.fraction == pytest.approx(1 - missed / total)


@pytest.mark.parametrize(("width", "group"), [(256, 128), (192, 64), (160, 32), (200, 32)])
def test_auto_stands_with_the_largest_group_that_divides_all_widths(width: int, group: int) -> None:
    model = config(hidden_size=128, intermediate_size=width)
    assert prospective(model, PRESETS["auto"].recipe).linear == Precision("int4", group)
    assert prospective(model, PRESETS["int4-gptq"].recipe) == PRESETS["int4-gptq"].recipe
    assert [p.group_size for p in CANDIDATES if p.kind == "int4"] == list(AUTO_GROUPS)


def test_the_gate_names_every_module_as_a_pattern() -> None:
    found = coverage(config(intermediate_size=176, num_hidden_layers=12), load_recipe("int4-rtn", group_size=64))
    with pytest.raises(BudgetError) as caught:
        gate(found, 1.0)
    assert caught.value.exit_code == 6 and caught.value.kind == "coverage.missed"
    assert "model.layers.*.mlp.down_proj (K=176 not divisible by 64), 12 tensors" in caught.value.message
    assert "--group-size" in caught.value.remedy and "--min-coverage" in caught.value.remedy
    gate(found, found.fraction)
    gate(coverage(config(), load_recipe("int4-rtn")))


def test_the_gate_lists_different_modules_apart() -> None:
    with pytest.raises(BudgetError) as caught:
        gate(coverage(config(hidden_size=72), load_recipe("int4-rtn")))
    for module in ("model.embed_tokens", "lm_head (", "model.layers.*.self_attn.q_proj", "model.layers.*.mlp.up_proj"):
        assert module in caught.value.message


def test_json_form() -> None:
    found = coverage(config(), load_recipe("int4-rtn")).to_json()
    assert found["fraction"] == 1.0 and isinstance(found["tensors"], list)
    assert found["tensors"][-1] == {"name": "lm_head.weight", "requested": "int4/g32", "actual": "int4/g32", "why": ""}
