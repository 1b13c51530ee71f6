"""The forecast of an engine's size, against engines that were built."""

from dataclasses import replace
from pathlib import Path

import pytest

from calibration.presets import PRESETS
from exporter.artifact.tokenizer_files import read_tokenizer
from exporter.core.config import ModelConfig
from exporter.core.progress import NoProgress
from exporter.core.recipe import Recipe
from exporter.options import BuildOptions
from exporter.plan import engine_bytes, make_plan
from exporter.requested_recipe import requested_recipe
from targets.base import Limits
from targets.registry import get_target
from tests.support.tiny import SHAPES
from tests.targets.engines import build_source

EXAMPLE = Path(__file__).parents[1] / "examples" / "stdlib-llama"
TARGETS = pytest.mark.parametrize("target", ["onnxruntime", "tvm"])
# Page gaps, and what a graph or a library differs from the average: docs/targets.md promises it.
BOUND = 150_000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    """Bytes of an engine and its tokenizer. Recipes that differ in algorithms alone store the same."""
    sizes: dict[tuple[Path, str, Recipe], int] = {}

    def size(options: BuildOptions) -> int:
        if options.target == "tvm":
            pytest.importorskip("tvm", reason="apache-tvm is not installed: no engine can be compiled")
        target, config = get_target(options.target), ModelConfig.from_directory(options.checkpoint)
        recipe = replace(requested_recipe(options, target, config), name="", algorithms=())
        key = (options.checkpoint, options.target, recipe)
        if key not in sizes:
            out = tmp_path_factory.mktemp("engine")
            limits = Limits(options.max_batch, options.sequence_limit(config))
            target.build(build_source(options.checkpoint, recipe, limits), out, NoProgress())
            read_tokenizer(options.checkpoint, config).write(out)
            sizes[key] = sum(path.stat().st_size for path in out.iterdir())
        return sizes[key]

    return size


@TARGETS
@pytest.mark.parametrize("recipe", [name for name in PRESETS if name != "auto"])  # what that stores, text decides
def test_every_recipe_on_a_tiny_model(tiny_checkpoint, built, target: str, recipe: str) -> None:
    options = BuildOptions(tiny_checkpoint("gqa"), Path("unused"), target, recipe=recipe)
    assert abs(make_plan(options).engine_bytes - built(options)) <= BOUND


@TARGETS
@pytest.mark.parametrize("recipe", ["int4-rtn", "nvfp4", "fp8-channel", "int8-weight"])
def test_the_example(built, target: str, recipe: str) -> None:
    options = BuildOptions(EXAMPLE, Path("unused"), target, recipe=recipe)
    assert abs(make_plan(options).engine_bytes - built(options)) <= BOUND


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(tiny_checkpoint, built, shape: str) -> None:
    options = BuildOptions(tiny_checkpoint(shape), Path("unused"), "onnxruntime", recipe="int4-rtn-asym")
    assert abs(make_plan(options).engine_bytes - built(options)) <= BOUND


def test_positions_and_the_tokenizer_count(tiny_checkpoint) -> None:
    """Cosines and sines of 16 dimensions more a position, float32; files of the tokenizer as they are."""
    options = BuildOptions(tiny_checkpoint("gqa"), Path("unused"), "onnxruntime")
    config, covered = ModelConfig.from_directory(options.checkpoint), make_plan(options).coverage
    short, long = (engine_bytes(options, config, covered, Limits(1, positions)) for positions in (10, 1010))
    assert long - short == 1000 * 4 * config.head_dim
    without = replace(options, checkpoint=Path("nowhere"))
    kept = sum(len(data) for data in read_tokenizer(options.checkpoint, config).files.values())
    found = short - engine_bytes(without, config, covered, Limits(1, 10))
    assert abs(found - kept) < 200, "JSON is written anew"
