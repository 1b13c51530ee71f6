"""Recipes as TOML files: every table, and each fault refused with its entry."""

from pathlib import Path

import pytest

from calibration.presets import load_recipe, read_recipe
from exporter.core.errors import InputError
from exporter.core.recipe import CHANNEL, TENSOR, AlgorithmOptions, Override, Precision


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_everything_that_a_file_may_name(tmp_path: Path) -> None:
    text = """
        name = "mine"
        base = "int8-smoothquant"
        kv_cache = "fp8"
        algorithms = ["gptq", "smoothquant", "rotate"]
        [options]
        smooth_alpha = 0.6
        damping = 0.02
        act_order = false
        block = 64
        observer = "percentile"
        percentile = 99.9
        [linear]
        activations = "int8/tensor"
        [lm_head]
        kind = "fp8"
        group_size = "channel"
        activations = "fp8/token"
        [embedding]
        kind = "nf4"
        group_size = 16
        [layers."layers.0.*"]
        kind = "int4"
        group_size = 64
        symmetric = false
        activations = ""
        [layers."*.mlp.down_proj"]
        kind = "mxfp4"
    """
    recipe = read_recipe(write(tmp_path / "mine.toml", text))
    assert recipe.name == "mine" and recipe.kv_cache == "fp8"
    assert recipe.algorithms == ("rotate", "smoothquant", "gptq"), "in the order in which they run"
    assert recipe.options == AlgorithmOptions(0.6, True, 0.02, False, 64, "percentile", 99.9)
    assert recipe.linear == Precision("int8", CHANNEL, activations="int8/tensor")
    assert recipe.lm_head == Precision("fp8", CHANNEL, activations="fp8/token")
    assert recipe.embedding == Precision("nf4", 16)
    assert recipe.overrides == (
        Override("layers.0.*", Precision("int4", 64, symmetric=False)),
        Override("*.mlp.down_proj", Precision("mxfp4", 32)),
    )
    assert recipe.layer_precision(0, "self_attn.q_proj").kind == "int4"
    assert recipe.layer_precision(0, "mlp.down_proj").kind == "mxfp4"
    assert recipe.layer_precision(1, "self_attn.q_proj") == recipe.linear


@pytest.mark.parametrize(
    ("base", "section", "expected"),
    [
        ("int4-rtn", 'kind = "fp8"', Precision("fp8", TENSOR)),
        ("int4-rtn", 'kind = "fp8"\ngroup_size = "channel"', Precision("fp8", CHANNEL)),
        ("int4-rtn", 'kind = "nvfp4"', Precision("nvfp4", 16)),
        ("int4-rtn", 'kind = "nvfp4"\ngroup_size = 16', Precision("nvfp4", 16)),
        ("int4-rtn", 'kind = "nf4"', Precision("nf4", 32)),
        ("int4-rtn-asym", 'kind = "nf4"', Precision("nf4", 32)),
        ("int4-rtn", "group_size = 'channel'", Precision("int4", CHANNEL)),
        ("w4a8", 'kind = "int8"', Precision("int8", 32, activations="int8/token")),
        ("w4a8", 'kind = "int8"\nactivations = ""', Precision("int8", 32)),
        ("fp8", "group_size = 'channel'", Precision("fp8", CHANNEL, activations="fp8/tensor")),
        ("nvfp4", 'kind = "int4"', Precision("int4", 16)),
        ("fp8-channel", 'kind = "int4"', Precision("int4", CHANNEL)),
        (
            "int4-awq",
            'group_size = 128\nactivations = "fp8/tensor"',
            Precision("int4", 128, activations="fp8/tensor"),
        ),
        ("nvfp4", 'activations = "nvfp4/tensor"', Precision("nvfp4", 16, activations="nvfp4/tensor")),
        ("fp32", 'kind = "int4"', Precision("int4", 32)),
        ("fp8-channel", 'kind = "bf16"', Precision("bf16")),
    ],
)
def test_a_new_kind_keeps_what_fits_it(tmp_path: Path, base: str, section: str, expected: Precision) -> None:
    text = f'base = "{base}"\nalgorithms = []\n[linear]\n{section}\n'
    assert read_recipe(write(tmp_path / "a.toml", text)).linear == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('algorithms = "gptq"', "algorithms is 'gptq'"),
        ("algorithms = [4]", r"algorithms is \[4\]"),
        ('algorithms = ["gtpq"]', "unknown algorithms gtpq"),
        ('algorithms = ["gptq", "gptq"]', "named twice"),
        ("options = 4", "options is 4"),
        ('base = "auto"', "base is 'auto', which chooses"),
        ('name = "auto"', "name is 'auto'"),
        ('name = ""', "name is ''"),
        ('name = "a\\nb"', r"name is 'a\\nb'"),
        ("[layers]\nfoo = 1", 'layers."foo" is 1'),
        ("[options]\nalpha = 0.5", r"\[options\] has unknown entries alpha"),
        ('[options]\nblock = "128"', r"\[options\] block is '128'"),
        ("[options]\nblock = true", r"\[options\] block is True"),
        ("[options]\nact_order = 1", r"\[options\] act_order is 1"),
        ("[options]\nobserver = 4", r"\[options\] observer is 4"),
        ("layers = 4", "layers is 4"),
        ('[layers]\n"*.q_proj" = 4', r"\*\.q_proj.? is 4"),
        ('[layers."*"]\nbits = 4', r'\[layers."\*"\] has unknown entries bits'),
        ('[layers."*"]\ngroup_size = "row"', "group_size is 'row'"),
        ('[layers."*"]\nkind = "int5"', "int5"),
        ("[linear]\ngroup_size = 0", "group_size is 0"),
        ("[linear]\ngroup_size = -1", "group_size is -1"),
        ('[linear]\ngroup_size = "tensor"', "group size tensor for int4"),
        ('[linear]\nkind = "nvfp4"\ngroup_size = 32', "group size 32 for nvfp4"),
        ('[linear]\nkind = "mxfp4"\nsymmetric = false', "mxfp4 with zero points"),
        ('[linear]\nactivations = "int4/token"', "unknown precision of activations"),
        ('[linear]\nactivations = "fp8/token"', "fp8/token activations for int4 weights"),
        ('[linear]\nsymmetric = false\nactivations = "fp8/tensor"', "fp8/tensor activations for int4 weights"),
        ('[linear]\nactivations = "nvfp4/tensor"', "nvfp4/tensor activations for int4 weights"),
        ('[linear]\nkind = "nvfp4"\nactivations = "fp8/tensor"', "fp8/tensor activations for nvfp4 weights"),
        ('[linear]\nkind = "nf4"\nactivations = "int8/token"', "int8/token activations for nf4 weights"),
        ('[linear]\nkind = "bf16"\nactivations = "int8/token"', "int8/token activations for bf16 weights"),
        ('[linear]\nactivations = "int4"', "unknown precision"),
        ("[linear]\nactivations = 8", r"\[linear\] activations is 8"),
        ('[embedding]\nactivations = "int8/token"', "activations for the embedding"),
        ('kv_cache = "int4"', "unknown KV cache"),
        ('base = "other.toml"', "unknown"),
    ],
)
def test_a_fault_is_refused_with_its_entry(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        load_recipe(write(tmp_path / "bad.toml", text))
    assert caught.value.exit_code == 2 and caught.value.remedy


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('base = "fp8"\nalgorithms = ["awq"]', "runs awq on layers in fp8/tensor"),
        ('base = "int4-awq"\n[linear]\nkind = "fp8"', "runs awq on layers in fp8/tensor"),
        ('base = "bf16"\nalgorithms = ["gptq"]', "runs gptq on layers in bf16"),
        ('base = "int4-rtn"\nalgorithms = ["smoothquant"]', "runs smoothquant on layers in int4/g32"),
        ('base = "fp8"\nalgorithms = ["smoothquant"]', "runs smoothquant on layers in fp8"),
        ('base = "nf4"\nalgorithms = ["rotate"]', "runs rotate on layers in nf4"),
        ('base = "int4-gptq"\n[options]\nsmooth_alpha = 0.5', "smooth_alpha belongs to smoothquant"),
        ('base = "int4-gptq"\n[options]\nawq_clip = false', "awq_clip belongs to awq"),
        ('base = "int4-awq"\n[options]\ndamping = 0.1', "damping belongs to gptq"),
        ('base = "int4-gptq"\n[options]\nblock = 99999999999999999999', "below 2"),
        ('base = "int4-rtn"\n[options]\nobserver = "mse"', "observer clips scales from calibration"),
        ('base = "fp8-channel"\n[options]\nobserver = "mse"', "observer clips scales from calibration"),
        ('base = "fp8"\n[options]\npercentile = 99.0', "percentile belongs to observer 'percentile'"),
        ('base = "fp8"\n[options]\nobserver = "median"', "observer is 'median'"),
        ('base = "fp8"\n[options]\nobserver = "percentile"\npercentile = 101', "percentile is 101"),
        ('base = "int8-smoothquant"\n[options]\nsmooth_alpha = 1.5', "smooth_alpha is 1.5"),
        ('base = "int4-gptq"\n[options]\ndamping = 0', "damping is 0"),
        ('base = "int4-gptq"\n[options]\nblock = 0', "block is 0"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        load_recipe(write(tmp_path / "bad.toml", text))
    assert caught.value.kind in ("recipe.algorithms", "recipe.options")


def test_a_layer_keeps_the_activations_of_its_own_kind(tmp_path: Path) -> None:
    """[layers] tables start from [linear]: int4 with inputs in fp8 keeps them where only its group changes."""
    text = 'base = "int4-awq"\n[linear]\nactivations = "fp8/tensor"\n[layers."*.down_proj"]\ngroup_size = 16\n'
    recipe = read_recipe(write(tmp_path / "mine.toml", text + '[layers."layers.0.*"]\nkind = "int8"\n'))
    assert recipe.layer_precision(1, "mlp.down_proj") == Precision("int4", 16, activations="fp8/tensor")
    assert recipe.layer_precision(0, "mlp.up_proj") == Precision("int8", 32)


def test_an_algorithm_may_be_for_some_layers_alone(tmp_path: Path) -> None:
    text = 'base = "fp8-channel"\nalgorithms = ["gptq"]\n[layers."*.mlp.*"]\nkind = "int4"\ngroup_size = 32\n'
    recipe = read_recipe(write(tmp_path / "some.toml", text))
    assert recipe.algorithms == ("gptq",) and recipe.layer_precision(3, "mlp.up_proj") == Precision("int4", 32)


def test_the_base_brings_its_algorithms_and_options(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "a.toml", 'base = "w4a8"\n[options]\nblock = 64\n'))
    assert recipe.algorithms == ("smoothquant", "gptq") and recipe.options == AlgorithmOptions(block=64)
    assert not read_recipe(write(tmp_path / "b.toml", 'base = "w4a8"\nalgorithms = []\n')).algorithms


@pytest.mark.parametrize(
    ("file", "text"), [("int4-rtn.toml", '[linear]\nkind = "int8"\n'), ("mine.toml", 'name = "bf16"\nbase = "bf16"\n')]
)
def test_a_file_is_not_named_after_a_preset(file: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="as a preset is") as caught:
        load_recipe(write(tmp_path / file, text))
    assert caught.value.kind == "recipe.file" and "name" in caught.value.remedy
