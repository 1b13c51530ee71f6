"""How large a target says that matrices are, against the bytes of engines that were built."""

import json
from pathlib import Path

import onnx
import pytest

from calibration.presets import parse_precision
from exporter.core.recipe import CHANNEL, Precision, Recipe, all_precisions
from targets.base import BuildSource
from targets.gpu_activations import refused_on_cpus
from targets.registry import get_target
from targets.tvm.isa import PROFILES
from targets.tvm.weight_file import plan_weights
from tests.targets.engines import Engine, build, build_source
from tests.targets.tvm.builds import build_tvm, lowered

PAGE = 4096
TARGETS = ("onnxruntime", "tvm")
# Every group size divides these widths, and whole blocks of every CPU's kernels hold these rows.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
BUILT = [precision for precision in all_precisions() if refused_on_cpus(precision) is None]
EACH = pytest.mark.parametrize("precision", BUILT, ids=Precision.describe)


def uniform(precision: Precision) -> Recipe:
    return Recipe(precision.describe(), precision, precision.weight_only, precision.weight_only)


def shapes(source: BuildSource) -> list[tuple[int, ...]]:
    """Of the matrices of an engine whose head is stored apart."""
    return [shape for shape in source.config.tensor_shapes.values() if len(shape) == 2]


def float_bytes(source: BuildSource, positions: int) -> int:
    """Norms, and tables of cosines and sines, in float32."""
    norms = sum(shape[0] for shape in source.config.tensor_shapes.values() if len(shape) == 1)
    return 4 * (norms + positions * source.config.head_dim)


def onnxruntime_bytes(engine: Engine) -> int:
    """Of all regions that the graph refers to; what else is in the file are gaps to the next page."""
    graph = onnx.load(str(engine.path / "model.onnx"), load_external_data=False).graph
    found = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer]
    regions = {(int(region["offset"]), int(region["length"])) for region in found if region}
    stored = sum(length for _, length in regions)
    file = (engine.path / "model.onnx.data").stat().st_size
    assert stored <= file < stored + PAGE * len(regions)
    return stored


def tvm_bytes(engine: Engine) -> int:
    """Of all tensors in the index; what else is in the file are gaps to the next page."""
    tensors = json.loads((engine.path / "engine.json").read_text())["tensors"].values()
    stored = sum(tensor["bytes"] for tensor in tensors)
    file = (engine.path / "weights.bin").stat().st_size
    assert stored <= file < stored + PAGE * len(tensors)
    return int(stored)


def bytes_of_matrices(target: str, source: BuildSource, precision: Precision) -> int:
    bits = sum(get_target(target).matrix_bits(precision, *shape) for shape in shapes(source))
    assert bits % 8 == 0
    return bits // 8


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines without their library: the weights are those of any engine."""
    pytest.importorskip("tvm", reason="apache-tvm is not installed: nothing is lowered")
    monkeypatch.setattr("targets.tvm.build.compile_engine", lambda *_: None)


@EACH
def test_onnxruntime(tiny_checkpoint, tmp_path: Path, precision: Precision) -> None:
    source = build_source(tiny_checkpoint("gqa", **WIDE), uniform(precision))
    stored = onnxruntime_bytes(build(source, tmp_path))
    # Cosines and sines of one position more: padding looks them up.
    floats = float_bytes(source, source.limits.max_seq_len + 1)
    assert stored == bytes_of_matrices("onnxruntime", source, precision) + floats


@EACH
def test_tvm(tiny_checkpoint, tmp_path: Path, uncompiled: None, precision: Precision) -> None:
    source = build_source(tiny_checkpoint("gqa", **WIDE), uniform(precision))
    expected = bytes_of_matrices("tvm", source, precision) + float_bytes(source, source.limits.max_seq_len)
    assert tvm_bytes(build_tvm(source, tmp_path)) == expected
    for isa in PROFILES.values():
        weights = (stored for part in lowered(source, isa.name).slices for stored in part.stored)
        assert plan_weights(weights, source.checkpoint, isa).weights_bytes == expected, isa.name


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("precision", [Precision("int4", 16, False), Precision("nvfp4", 16), Precision("fp8", CHANNEL)])
def test_rows_that_fill_a_block_of_tvm_are_not_counted(tiny_checkpoint, uncompiled, precision, name) -> None:
    """A table and a head of 333 rows, stored as the next multiple of two vectors of rows."""
    source, isa = build_source(tiny_checkpoint("odd_vocabulary"), uniform(precision)), PROFILES[name]
    weights = (stored for part in lowered(source, name).slices for stored in part.stored)
    stored = plan_weights(weights, source.checkpoint, isa).weights_bytes
    counted = bytes_of_matrices("tvm", source, precision) + float_bytes(source, source.limits.max_seq_len)
    filled = -333 % (2 * isa.lanes)
    assert stored - counted == 2 * get_target("tvm").matrix_bits(precision, filled, 64) // 8


def test_the_table_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")
    table = page.split("### What a weight takes")[1].split("\n\n")[2].splitlines()[2:]
    rows = [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in table]
    assert len(rows) == 12
    for text, *said in rows:
        bits = [get_target(name).matrix_bits(parse_precision(text), 4096, 4096) / 4096**2 for name in TARGETS]
        assert said == [f"{each:.4g}" for each in bits], text


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_that_nothing_divides_can_still_be_planned(target: str, kind: str) -> None:
    """Such a build is refused, but a plan says so beside a size."""
    assert get_target(target).matrix_bits(Precision(kind, CHANNEL), 8, 24) > 8 * 24 * Precision(kind, CHANNEL).bits
