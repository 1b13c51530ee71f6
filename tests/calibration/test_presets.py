"""Recipes by name and from TOML, with the command line's overrides; every refusal with its exit code."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.presets import PRESETS, completed, load_recipe, parse_precision, preset, read_recipe
from exporter.core.errors import InputError
from exporter.core.recipe import KV_CACHES, TENSOR, Precision, Recipe, all_precisions

INT4, INT8 = Precision("int4", 32), Precision("int8", 32)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_presets_are_those_of_the_contract() -> None:
    assert list(PRESETS) == [
        *("fp32", "bf16", "fp16", "int8-weight", "int8-smoothquant", "int4-rtn", "int4-rtn-asym"),
        *("int4-awq", "int4-gptq", "nf4", "w4a8", "fp8", "fp8-channel", "nvfp4", "mxfp4", "auto"),
    ]
    for name, entry in PRESETS.items():
        assert preset(name) is entry.recipe and entry.recipe.name == name and entry.summary
    assert preset("fp32").lossless
    assert preset("int4-rtn").linear == INT4 and preset("int4-rtn").lm_head == INT4
    assert preset("int8-weight").linear == preset("int8-weight").embedding == INT8
    assert preset("int4-rtn-asym").linear == Precision("int4", 32, symmetric=False)


@pytest.mark.parametrize("name", ["int5", "", "INT4-RTN", "../int4-rtn"])
def test_unknown_recipes_are_bad_input(name: str) -> None:
    with pytest.raises(InputError, match="unknown") as caught:
        load_recipe(name)
    assert caught.value.exit_code == 2 and all(known in caught.value.remedy for known in PRESETS)


def test_group_size_reaches_every_integer_part() -> None:
    recipe = load_recipe("int4-rtn", group_size=128)
    assert (recipe.linear.group_size, recipe.lm_head.group_size, recipe.embedding.group_size) == (128, 128, 128)
    for name, size in (("fp32", 32), ("bf16", 64), ("int4-rtn", 48), ("int4-rtn", 0)):
        with pytest.raises(InputError, match="group") as caught:
            load_recipe(name, group_size=size)
        assert caught.value.kind == "recipe.group_size"


def test_head_and_embedding_are_overridden_and_inherit_the_group_size() -> None:
    recipe = load_recipe("int4-rtn", group_size=64, lm_head="int8", embedding="int4/g16/asym")
    assert recipe.lm_head == Precision("int8", 64)
    assert recipe.embedding == Precision("int4", 16, symmetric=False)
    recipe = load_recipe("fp32", lm_head="int8", embedding="bf16")
    assert recipe.lm_head == INT8 and recipe.embedding == Precision("bf16") and recipe.linear == Precision()


@pytest.mark.parametrize("precision", all_precisions(), ids=Precision.describe)
def test_describe_writes_what_precision_reads(precision: Precision) -> None:
    assert parse_precision(precision.describe()) == precision


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4", Precision("int4", 64)),
        ("int4/asym", Precision("int4", 64, symmetric=False)),
        ("nf4", Precision("nf4", 64)),
        ("fp8", Precision("fp8", TENSOR)),
        ("nvfp4", Precision("nvfp4", 16)),
        ("mxfp4/g32", Precision("mxfp4", 32)),
        ("int8+int8/token", Precision("int8", 64, activations="int8/token")),
    ],
)
def test_a_precision_without_its_group(text: str, expected: Precision) -> None:
    assert parse_precision(text, 64) == expected


BAD = (
    "int5, ,int4/,int4/32,int4/g,int4/g-32,int4/g33,int4/g32/g32,int4/sym,bf16/g32,int6/asym,int4/tensor,fp8/g32,"
    "nvfp4/g32,mxfp4/channel,nf4/asym,int8/channel/g32,int8+,int8+int8,int8+fp8/token,nf4+int8/token,bf16+int8/token,"
    "int8/token,fp8/channel+fp8"
).replace(" ", "")


@pytest.mark.parametrize("text", BAD.split(","))
def test_bad_precisions(text: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("int4-rtn", lm_head=text)
    assert caught.value.exit_code == 2 and caught.value.remedy


def test_rotation_is_an_option_of_integer_recipes() -> None:
    for name in ("int4-rtn", "int4-awq", "int8-weight", "w4a8", "int8-smoothquant"):
        recipe = load_recipe(name, rotate=True)
        assert recipe.algorithms == ("rotate", *preset(name).algorithms) and recipe.calibrated
        assert recipe.needs_data == preset(name).needs_data
    for name in ("fp32", "bf16", "nf4", "fp8", "nvfp4"):
        with pytest.raises(InputError, match=f"'{name}' runs rotate") as caught:
            load_recipe(name, rotate=True)
        assert caught.value.exit_code == 2


NEEDING_TEXT = {"int8-smoothquant", "int4-awq", "int4-gptq", "w4a8", "fp8", "auto"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_what_they_cost_and_need(name: str) -> None:
    listed = PRESETS[name]
    assert listed.needs == ("calibration text" if name in NEEDING_TEXT else "nothing")
    assert listed.recipe.calibrated == (name in NEEDING_TEXT)
    parts = r"([\d.]+) bits a weight(?:(?:, layers\.0\.\* 16)?, lm_head ([\d.]+), embedding ([\d.]+))?"
    found = re.fullmatch(parts, listed.costs)
    assert found is not None
    linear = float(found[1])
    assert listed.recipe.linear.bits <= linear <= listed.recipe.linear.bits + 2


def test_fp8_leaves_the_first_layer_in_16_bits(tmp_path: Path) -> None:
    """A file says otherwise: what it names comes after what its base has, and the last that matches holds."""
    recipe, bf16 = preset("fp8"), Precision("bf16")
    for index, expected in ((0, bf16), (1, recipe.linear), (10, recipe.linear)):
        assert recipe.layer_precision(index, "mlp.up_proj") == expected
    everywhere = 'base = "fp8"\n[layers."layers.0.*"]\nkind = "fp8"\nactivations = "fp8/tensor"\n'
    plain = read_recipe(write(tmp_path / "plain.toml", everywhere))
    assert all(plain.layer_precision(index, "mlp.up_proj") == recipe.linear for index in range(3))


@pytest.mark.parametrize(
    ("head", "embedding", "expected"),
    [("fp16", "fp16", "fp16"), ("bf16", "bf16", "bf16"), ("int8/g32", "fp16", "fp16"), ("fp32", "fp32", "bf16")],
)
def test_a_layer_that_a_preset_leaves_alone_has_the_type_of_head_or_embedding(
    head: str, embedding: str, expected: str
) -> None:
    """The target chooses that type as if no layer were in one: they follow it, they do not tell it."""
    seen: list[Recipe] = []

    def complete(recipe: Recipe, unnamed: frozenset[str]) -> Recipe:
        seen.append(recipe)
        return replace(recipe, lm_head=parse_precision(head), embedding=parse_precision(embedding))

    found = load_recipe("fp8", complete=complete)
    assert not seen[0].overrides and seen[0].linear == found.linear == preset("fp8").linear
    assert [(each.pattern, each.precision.kind) for each in found.overrides] == [("layers.0.*", expected)]
    assert completed(preset("w4a8"), frozenset(), complete).overrides == ()


def test_overrides_of_a_file_are_what_it_says(tmp_path: Path) -> None:
    """A target's `complete` sees them, and they stay."""
    text = 'base = "fp8"\n[layers."layers.1.*"]\nkind = "fp16"\n'
    found = load_recipe(write(tmp_path / "mine.toml", text), complete=lambda recipe, unnamed: recipe)
    assert [each.precision.kind for each in found.overrides] == ["bf16", "fp16"]


def test_calibrated_presets_round_and_store_like_their_plain_ones() -> None:
    plain = preset("int4-rtn")
    for name in ("int4-awq", "int4-gptq"):
        assert replace(preset(name), name=plain.name, algorithms=()) == plain
    assert preset("w4a8").linear.weight_only == plain.linear


def test_kv_cache() -> None:
    assert load_recipe("int4-rtn").kv_cache == "fp32"
    for kind in KV_CACHES:
        assert load_recipe("int4-rtn", kv_cache=kind).kv_cache == kind
    for unknown in ("int3", ""):
        with pytest.raises(InputError, match="unknown KV cache"):
            load_recipe("int4-rtn", kv_cache=unknown)


def test_the_target_is_told_what_nobody_named(tmp_path: Path) -> None:
    told: list[frozenset[str]] = []

    def complete(recipe: Recipe, unnamed: frozenset[str]) -> Recipe:
        told.append(unnamed)
        return replace(recipe, kv_cache="fp16") if "kv_cache" in unnamed else recipe

    def load(source: str | Path, **named: str) -> Recipe:
        return load_recipe(source, complete=complete, **named)  # type: ignore[arg-type]

    text = 'kv_cache = "int8"\n[linear]\ngroup_size = 64\n[embedding]\nkind = "int4"'
    silent, cache = write(tmp_path / "a.toml", 'base = "int8-weight"'), write(tmp_path / "b.toml", text)
    assert load("int4-rtn").kv_cache == load(silent).kv_cache == "fp16"
    assert load(cache).kv_cache == read_recipe(cache).kv_cache == "int8"
    assert load(cache, kv_cache="fp32").kv_cache == "fp32"
    load("int4-rtn", lm_head="int4", embedding="int8/g32")
    everything = frozenset({"lm_head", "embedding", "kv_cache"})
    layers = {"linear", "group_size"}
    assert told == [everything | layers, everything, {"lm_head"}, {"lm_head"}, {"kv_cache"} | layers]
    assert not load_recipe("fp32", kv_cache="fp16").lossless


def test_a_toml_file_changes_what_it_names(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.toml",
        'base = "int4-rtn"\n[linear]\ngroup_size = 64\nsymmetric = false\n[lm_head]\nkind = "int8"\n'
        '[embedding]\nkind = "bf16"\n',
    )
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.linear == Precision("int4", 64, symmetric=False)
    assert recipe.lm_head == INT8 and recipe.embedding == Precision("bf16")
    assert load_recipe(str(path), group_size=128).linear.group_size == 128
    named = read_recipe(write(tmp_path / "other.toml", 'name = "small"\nbase = "bf16"\n[linear]\nkind = "int8"\n'))
    assert named.name == "small" and named.linear == INT8 and named.lm_head == Precision("bf16")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("base = ", "not TOML"),
        ('base = "int9"', "unknown"),
        ("base = 4", "base is 4"),
        ("[linears]\n", "linears"),
        ("linear = 4", "linear is 4"),
        ("[linear]\nbits = 4", "bits"),
        ('[linear]\nkind = "int5"', "int5"),
        ("[linear]\nkind = 4", "kind is 4"),
        ("[linear]\ngroup_size = true", "group_size is True"),
        ("[linear]\ngroup_size = 33", "33"),
        ("[linear]\nsymmetric = 1", "symmetric is 1"),
        ('[linear]\nkind = "bf16"\ngroup_size = 32', "bf16"),
        ('[linear]\nkind = "bf16"\nsymmetric = true', "symmetric"),
        ('kv_cache = "int3"', "int3"),
    ],
)
def test_a_bad_toml_file_is_refused_with_its_entry(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        load_recipe(write(tmp_path / "bad.toml", text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.toml").mkdir()
    for name in ("absent.toml", "binary.toml", "folder.toml"):
        with pytest.raises(InputError) as caught:
            load_recipe(tmp_path / name)
        assert caught.value.kind == "recipe.file" and name in caught.value.message


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def test_the_document_lists_the_presets_as_they_are() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (\S+) \| (\S+) \| (\S+) \|", DOCUMENT.read_text(encoding="utf-8"), re.M)
    recipes = [entry.recipe for entry in PRESETS.values()]
    assert rows == [(r.name, *(p.describe() for p in (r.linear, r.lm_head, r.embedding))) for r in recipes]


def test_the_documents_example_is_a_recipe(tmp_path: Path) -> None:
    example = re.search(r"```toml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    assert example is not None
    recipe = load_recipe(write(tmp_path / "example.toml", example[1]))
    assert recipe.name == "int4-small" and recipe.linear == Precision("int4", 128, symmetric=False)
    assert recipe.lm_head == Precision("int8", 64) and recipe.embedding == Precision("bf16")


def test_the_documents_second_example_has_layers_of_their_own(tmp_path: Path) -> None:
    examples = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    recipe = load_recipe(write(tmp_path / "layers.toml", examples[1]))
    assert recipe.algorithms == ("gptq",) and recipe.options.damping == 0.02
    assert recipe.layer_precision(0, "mlp.up_proj") == recipe.layer_precision(5, "mlp.down_proj") == INT8
    assert recipe.layer_precision(5, "mlp.up_proj") == INT4


def test_the_documents_plain_fp8_rounds_every_layer(tmp_path: Path) -> None:
    text = next(
        each for each in re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text("utf-8"), re.S) if "fp8-plain" in each
    )
    recipe = load_recipe(write(tmp_path / "plain.toml", text))
    assert recipe.name == "fp8-plain" and not recipe.algorithms
    assert {recipe.layer_precision(index, "mlp.up_proj") for index in range(9)} == {preset("fp8").linear}


def test_int6_has_no_zero_points(tmp_path: Path) -> None:
    """A kind without them leaves those of its base behind; asking for them is an error."""
    six = write(tmp_path / "six.toml", 'base = "int4-rtn-asym"\n[lm_head]\nkind = "int6"\n')
    assert load_recipe(six).lm_head == Precision("int6", 32)
    write(six, 'base = "int4-rtn"\n[lm_head]\nkind = "int6"\nsymmetric = false\n')
    with pytest.raises(InputError, match="int6 with zero points") as caught:
        load_recipe(six)
    assert caught.value.exit_code == 2 and "symmetric" in caught.value.remedy
