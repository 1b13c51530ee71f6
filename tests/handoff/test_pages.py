"""Tables of docs/serving.md and docs/targets: what they say is what the code does."""

import re
from pathlib import Path

import pytest

from calibration.presets import load_recipe
from exporter.catalogue import TYPICAL
from exporter.core.engine_options import EngineOptions
from exporter.core.recipe import Recipe
from exporter.handoff.files import routes
from targets.registry import get_target
from targets.tensorrt_llm.support import NAMES, kv_cache_support
from tests.handoff.samples import checkpoint_facts

DOCS = Path(__file__).parents[2] / "docs"


def table(page: str, first: str) -> list[list[str]]:
    """The rows of the table whose first header is `first`; an empty first cell repeats that above."""
    lines = (DOCS / page).read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows: list[list[str]] = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.append([cells[0] or rows[-1][0], *cells[1:]])
    return rows


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def completed(name: str, form: str) -> Recipe:
    target = get_target("tensorrt-llm")
    engine = EngineOptions(format=form)
    return load_recipe(name, complete=lambda recipe, unnamed: target.complete(recipe, unnamed, TYPICAL, engine))


@pytest.mark.parametrize("row", table("targets/tensorrt-llm.md", "recipe"), ids=lambda row: row[0])
def test_which_recipe_each_form_holds(row: list[str]) -> None:
    for cell, form in zip(row[1:], ("hf", "compressed-tensors", "trtllm"), strict=True):
        for name in names(row[0]):
            if name.startswith("--kv-cache"):
                assert bool(cell) == kv_cache_support(name.split()[1], form).usable
                continue
            recipe = completed(name, form)
            found = get_target("tensorrt-llm").supports(TYPICAL, recipe, engine=EngineOptions(format=form))
            assert found.usable == bool(cell), f"{name} in {form}: {found.why}"
            if cell and recipe.linear.is_coded:
                assert str(NAMES[form](recipe.linear)).startswith(cell.split(",")[0].split()[0])


ALGORITHMS = {"W8A8": "W8A8_INT8", "W4A16, W8A16": "W4A16"}


@pytest.mark.parametrize("row", table("serving.md", "`--format`"), ids=lambda row: f"{row[0]} {row[2]}")
def test_who_loads_what(row: list[str]) -> None:
    (form,), (_, algorithm, *cells) = names(row[0]), row[1:]
    if form == "trtllm":
        assert [route.name for route in routes(checkpoint_facts(form, "FP8"))] == ["trtllm-build"]
        return
    found = routes(checkpoint_facts(form, ALGORITHMS.get(algorithm, algorithm)))
    for cell, route in zip(cells, found, strict=True):
        assert route.open == (cell not in ("no",) and not cell.startswith("**never**"))
        for method in names(cell):
            assert method in route.commands[0]


@pytest.mark.parametrize("row", table("targets/tensorrt.md", "recipe"), ids=lambda row: row[0])
def test_what_tensorrt_makes_of_a_recipe(row: list[str]) -> None:
    target = get_target("tensorrt")
    words = {"refused": "refused", "emulated": "emulated"}
    wanted = next((level for level, word in words.items() if word in row[1]), "native")
    for name in names(row[0]):
        recipe = load_recipe(name, complete=lambda found, unnamed: target.complete(found, unnamed, TYPICAL))
        assert target.supports(TYPICAL, recipe).level == wanted, name
