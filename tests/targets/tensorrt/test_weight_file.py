"""model.onnx.data: what lies where, how many bits it takes, and scales that no engine can have."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from exporter.core.errors import UnsupportedError
from exporter.core.recipe import TENSOR, Precision, all_precisions
from exporter.core.weights import QuantizedRows
from targets.tensorrt.file_names import DATA
from targets.tensorrt.formats import form_of, matrix_bits, stored_group
from targets.tensorrt.support import precision_support
from tests.support.tiny import write_checkpoint
from tests.targets.engines import build_source
from tests.targets.tensorrt.typed_engines import LIMITS, recipe_of, typed, typed_source

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
TAKEN = [precision for precision in all_precisions() if precision_support(precision).usable]
SHAPES = {"self_attn.qkv_proj": (512, 256), "self_attn.o_proj": (256, 256), "mlp.down_proj": (256, 512)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), **WIDE)


def stored_bits(path, name: str) -> int:
    """Bits of a matrix's initializers that lie outside model.onnx."""
    graph = onnx.load(str(path), load_external_data=False).graph
    entries = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.name.startswith(f"layers.0.{name}.")
    ]
    return 8 * sum(int(entry["length"]) for entry in entries if entry)


@pytest.mark.parametrize("precision", TAKEN, ids=Precision.describe)
def test_matrices_take_the_bits_that_are_told(checkpoint, tmp_path, precision):
    half = "bf16" if precision.kind == "bf16" else "fp16"
    model = typed(checkpoint, recipe_of(precision, half), tmp_path).model
    for name, (rows, width) in SHAPES.items():
        # The stack of q, k and v has three scales, one for each row.
        repeated = 32 * rows if precision.group_size == TENSOR and name.endswith("qkv_proj") else 0
        assert stored_bits(model.path, name) == matrix_bits(precision, rows, width) + repeated, name
    assert (tmp_path / DATA).stat().st_size >= model.weights_bytes


def test_blocks_of_int4_are_never_as_wide_as_a_row():
    groups = [(stored_group(Precision("int4", group), 256)) for group in (16, 32, 64, 128, 256, -1)]
    assert groups == [16, 32, 64, 128, 128, 128]
    assert stored_group(Precision("int4", 64), 64) == 32
    assert stored_group(Precision("int4", -1), 176) == 16
    assert stored_group(Precision("int4", -1), 100) == 0


class Scaled:
    """A row reader whose scales were spoiled, and that counts what it is asked for."""

    def __init__(self, rows, change) -> None:
        self.rows, self.change = rows, change

    def __call__(self, weight, start, stop):
        found = self.rows(weight, start, stop)
        if isinstance(found, QuantizedRows):
            return replace(found, scales=self.change(found.scales.copy()))
        return found


def spoiled(value):
    def change(scales):
        scales[0, 0] = value
        return scales

    return change


@pytest.mark.parametrize(
    ("precision", "value"),
    [
        *((Precision("fp8", -1), value) for value in (0.0, -0.5, np.inf, np.nan)),
        *((Precision("int8", 32), value) for value in (0.0, np.inf, np.nan)),
    ],
    ids=str,
)
def test_scales_that_are_no_positive_numbers_are_refused(checkpoint, tmp_path, precision, value):
    source = build_source(checkpoint, recipe_of(precision), LIMITS)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.self_attn\.qkv_proj has the scale") as error:
        typed_source(replace(source, rows=Scaled(source.rows, spoiled(value))), tmp_path)
    assert error.value.kind == "tensorrt.scales"


@pytest.mark.parametrize("group", [32, 128])
def test_scales_of_int4_are_positive(checkpoint, tmp_path, group):
    model = typed(checkpoint, recipe_of(Precision("int4", group)), tmp_path).model
    proto = onnx.load(str(model.path))
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(".scales"):
            assert (onnx.numpy_helper.to_array(tensor) > 0).all(), tensor.name


def test_every_precision_has_a_form():
    assert {form_of(precision) for precision in TAKEN} == {"float", "rows", "int4", "blocks", "nvfp4"}
