"""docs/targets.md, cell by cell, against what the target answers. Engines of each cell: test_recipes.py."""

import re
from pathlib import Path

import pytest

from calibration.presets import PRESETS, preset
from exporter.core.config import parse_config
from exporter.core.errors import UnsupportedError
from exporter.core.recipe import GROUP_SIZES, KV_CACHES, Precision, Recipe, all_precisions
from exporter.core.support import Support
from targets.onnxruntime import target as target_module
from targets.registry import TARGETS, get_target
from tests.support.tiny import BASE, SHAPES

PAGE = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")
FP32 = Precision("fp32")


def table(first_column: str) -> dict[str, dict[str, str]]:
    """Rows of the table that starts with this heading: first cell -> {target: level}."""
    match = re.search(rf"^\| {first_column} \|(.*)\|\n\|[-|]+\|\n((?:\|.*\|\n)+)", PAGE, re.MULTILINE)
    assert match is not None
    targets = [cell.strip() for cell in match[1].split("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[2].splitlines()]
    return {row[0]: dict(zip(targets, row[1:], strict=True)) for row in rows}


CPU = ("onnxruntime", "tvm")


def config(shape: str = "gqa", **changes: object):
    return parse_config({**BASE, **SHAPES[shape], "model_type": "llama", **changes})


def test_the_page_has_every_recipe_and_target():
    assert set(table("recipe")) == set(PRESETS)
    assert set(CPU) < set(TARGETS)
    assert all(set(TARGETS) < set(row) for row in table("recipe").values())
    assert all(set(row) == set(CPU) for row in table("precision or cache").values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PRESETS)
def test_recipes_are_as_the_page_says(name, shape):
    for target in CPU:
        assert get_target(target).supports(config(shape), preset(name)).level == table("recipe")[name][target]


GROUPS = f"groups of {min(GROUP_SIZES)} to {max(GROUP_SIZES)}"
ROWS = {
    f"int8, {GROUPS}, symmetric or not": r"int8/g\d+(/asym)?",
    "int8, a scale per row, symmetric or not": "int8/channel(/asym)?",
    f"int6, {GROUPS}": r"int6/g\d+",
    f"int4, {GROUPS}, symmetric or not": r"int4/g\d+(/asym)?",
    "int4, a scale per row, symmetric or not": "int4/channel(/asym)?",
    "int8 or int4, int8 activations": r"int[84]/[^+]+\+int8/\w+",
    "int6, int8 activations": r"int6/[^+]+\+int8/\w+",
    "symmetric int4, fp8 activations": r"int4/\w+\+fp8/tensor",
    "nvfp4, nvfp4 activations": r"nvfp4\+nvfp4/tensor",
    "fp8, a scale per row or matrix": r"fp8/\w+",
    "fp8, fp8 activations": r"fp8/\w+\+fp8/\w+",
    f"nf4, {GROUPS}": r"nf4/g\d+",
}
"""Rows of the page's second table that stand for several names of `capabilities`, which the pattern matches; any
other row is a name itself."""


def row_of(name: str) -> str:
    return next((row for row, pattern in ROWS.items() if re.fullmatch(pattern, name)), name)


@pytest.mark.parametrize("name", CPU)
def test_capabilities_are_as_the_page_says(name):
    page = {row: levels[name] for row, levels in table("precision or cache").items()}
    found = get_target(name).capabilities()
    assert {*map(Precision.describe, all_precisions()), *(f"kv-cache {kind}" for kind in KV_CACHES)} == set(found)
    assert set(page) == set(map(row_of, found))
    assert {cell: support.level for cell, support in found.items()} == {cell: page[row_of(cell)] for cell in found}


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_not_native_says_why(name):
    found = get_target(name).capabilities().values()
    assert all(support.why for support in found if support.level != "native")
    assert all(support.remedy for support in found if support.level == "refused")


@pytest.mark.parametrize("part", ["linear", "lm_head", "embedding"])
def test_every_part_counts(part):
    for precision, level in ((Precision("int4", 64), "native"), (Precision("bf16"), "emulated")):
        parts = dict.fromkeys(("linear", "lm_head", "embedding"), FP32) | {part: precision}
        answer = get_target("onnxruntime").supports(config(), Recipe("r", **parts))
        assert answer.level == level
        assert (precision.kind in answer.why) == (level == "emulated")


def test_a_cache_it_cannot_store_is_refused():
    answer = get_target("onnxruntime").supports(config(), Recipe("r", FP32, FP32, Precision("bf16"), "fp8"))
    assert answer.level == "refused"
    assert "fp8" in answer.why
    assert "--kv-cache fp32" in answer.remedy


def test_other_targets_are_refused_by_name():
    with pytest.raises(UnsupportedError, match="unknown"):
        get_target("nonsense")


def test_probe_names_what_is_missing(monkeypatch):
    assert get_target("onnxruntime").probe() == Support("native")
    monkeypatch.setattr(target_module, "PACKAGES", ("onnxruntime", "no-such-package"))
    answer = get_target("onnxruntime").probe()
    assert (answer.level, get_target("onnxruntime").versions()["no-such-package"]) == ("refused", "")
    assert "no-such-package" in answer.why
    assert "pip install" in answer.remedy
