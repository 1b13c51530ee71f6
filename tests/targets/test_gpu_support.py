"""docs/targets.md on GPUs, cell by cell, against what the targets answer."""

import re

import pytest

from calibration.presets import PRESETS, load_recipe
from exporter.catalogue import TYPICAL
from exporter.core.engine_options import EngineOptions
from exporter.core.recipe import KV_CACHES, Precision, all_precisions
from targets.registry import get_target
from targets.tensorrt_llm.formats import FORMS
from targets.tensorrt_llm.support import kv_cache_support, precision_support
from tests.targets.test_support import table

COLUMNS = {
    "tensorrt": ("tensorrt", None),
    "tensorrt-llm": ("tensorrt-llm", None),
    "`--format trtllm`": ("tensorrt-llm", "trtllm"),
    "`--format compressed-tensors`": ("tensorrt-llm", "compressed-tensors"),
}
ROWS = {
    "bf16, fp16": "bf16|fp16",
    "int8, a scale per row": "int8/channel",
    "int8, groups of 32 to 128": "int8/g(32|64|128)",
    "int8, groups of 16 or 256": "int8/g(16|256)",
    "int6": r"int6/g\d+(\+int8/\w+)?",
    "int4, groups of 64 or 128": "int4/g(64|128)",
    "int4, groups of 32": "int4/g32",
    "int4, groups of 16 or 256": "int4/g(16|256)",
    "int4, a scale per row": "int4/channel",
    "any with zero points": ".*/asym.*",
    "int8, a scale per row, int8 activations": r"int8/channel\+int8/\w+",
    "int8 in groups, int8 activations": r"int8/g\d+\+int8/\w+",
    "int4, int8 activations": r"int4/\w+\+int8/\w+",
    "int4, groups of 128, fp8 activations": r"int4/g128\+fp8/tensor",
    "int4 otherwise, fp8 activations": r"int4/(g16|g32|g64|g256|channel)\+fp8/tensor",
    "fp8": "fp8/(tensor|channel)",
    "fp8, one scale, fp8 activations by one scale": r"fp8/tensor\+fp8/tensor",
    "fp8, a scale per row, fp8 activations by token": r"fp8/channel\+fp8/token",
    "fp8, the other two pairs": r"fp8/tensor\+fp8/token|fp8/channel\+fp8/tensor",
    "nvfp4, nvfp4 activations": r"nvfp4\+nvfp4/tensor",
    "nf4, mxfp4": r"nf4/g\d+|mxfp4",
    "kv-cache fp16, kv-cache bf16": "kv-cache (fp|bf)16",
}
"""Rows of the page that stand for several names, which the pattern matches; any other row is a name itself."""


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", PRESETS)
def test_recipes_are_as_the_page_says(name: str, column: str) -> None:
    target, engine = get_target(COLUMNS[column][0]), EngineOptions(format=COLUMNS[column][1])
    recipe = load_recipe(name, complete=lambda recipe, unnamed: target.complete(recipe, unnamed, TYPICAL, engine))
    answer = target.supports(TYPICAL, recipe, engine=engine)
    assert answer.level == table("recipe")[name][column]
    assert answer.usable or answer.remedy


def row_of(name: str) -> str:
    return next((row for row, pattern in ROWS.items() if re.fullmatch(pattern, name)), name)


@pytest.mark.parametrize("column", ["tensorrt", *FORMS])
def test_capabilities_are_as_the_page_says(column: str) -> None:
    page = {row: levels[column] for row, levels in table("precision or cache on GPUs").items()}
    if column == "tensorrt":
        found = get_target("tensorrt").capabilities()
    else:
        found = {precision.describe(): precision_support(precision, column) for precision in all_precisions()}
        found |= {f"kv-cache {kind}": kv_cache_support(kind, column) for kind in KV_CACHES}
    assert {*map(Precision.describe, all_precisions()), *(f"kv-cache {kind}" for kind in KV_CACHES)} == set(found)
    assert set(page) == set(map(row_of, found))
    assert {cell: support.level for cell, support in found.items()} == {cell: page[row_of(cell)] for cell in found}
    assert all(support.why and support.remedy for support in found.values() if support.level == "refused")
