"""Every cell of the table of precisions and caches: kernels that multiply as the recipe says, or a refusal in words."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import ml_dtypes
import numpy as np
import pytest

from calibration.rtn import quantize_rows
from exporter.core.config import ModelConfig, parse_config
from exporter.core.errors import UnsupportedError
from exporter.core.recipe import CHANNEL, KV_CACHES, Override, Precision, Recipe, all_precisions
from exporter.core.weights import QuantizedRows
from targets.gpu_activations import refused_on_cpus
from targets.tvm.activations import activation_rounding
from targets.tvm.formats import multiplies_integers, stored_group
from targets.tvm.isa import PROFILES
from targets.tvm.packing import layout
from targets.tvm.support import capabilities, recipe_support
from targets.tvm.tuning import Tuning
from tests.support.tiny import BASE
from tests.targets.tvm.builds import build_tvm, tvm_source

EVERY = {precision.describe(): precision for precision in all_precisions()}
CELLS = {name: precision for name, precision in EVERY.items() if refused_on_cpus(precision) is None}
FP32 = Precision("fp32")
ROWS, WIDTH, COUNT = 38, 512, 3
TUNING = Tuning(tile_rows=2)  # less code to compile


def test_every_precision_and_cache_has_a_cell():
    assert capabilities().keys() == {*EVERY, *(f"kv-cache {kind}" for kind in KV_CACHES)}


@pytest.mark.parametrize("name", sorted(EVERY.keys() - CELLS.keys()))
def test_activations_of_gpus_are_refused(name):
    answer = recipe_support(config(), Recipe("r", EVERY[name], FP32, FP32))
    assert answer == capabilities()[name] and answer.level == "refused"
    assert EVERY[name].activations in answer.why and "activations" in answer.remedy


@cache
def kernel(factory: str, *arguments: object) -> Callable[..., None]:
    """A kernel for the best profile that runs here."""
    from targets.tvm.lower.kernel_table import generate
    from tests.targets.tvm.kernels.native import NATIVE, compiled

    return compiled(generate(NATIVE[0], factory, factory, arguments, TUNING), NATIVE[0])


def packed_weights(precision: Precision, rows: QuantizedRows | np.ndarray) -> np.ndarray:
    from tests.targets.tvm.kernels.native import NATIVE, aligned

    packed = layout(precision, ROWS, WIDTH, NATIVE[0])
    taken = packed.pack(0, packed.blocks, lambda start, stop: sliced(rows, start, stop))
    return aligned(taken.view(packed.dtype))


def sliced(rows: QuantizedRows | np.ndarray, start: int, stop: int) -> QuantizedRows | np.ndarray:
    if not isinstance(rows, QuantizedRows):
        return rows[start:stop]
    zeros = None if rows.zero_points is None else rows.zero_points[start:stop]
    return QuantizedRows(rows.codes[start:stop], rows.scales[start:stop], zeros, rows.precision)


def product(precision: Precision, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """x [M, K] times a packed matrix, by the kernels that engines call for this precision."""
    from tests.targets.tvm.kernels.native import aligned

    rounding, y = activation_rounding(precision), aligned(np.full((COUNT, ROWS), np.nan, np.float32))
    x = aligned(x)
    if not multiplies_integers(precision):
        if rounding is not None:
            rounded = aligned(np.empty_like(x))
            kernel("round_fp8", WIDTH)(x, rounded)
            x = rounded
        kernel("linear_float", precision.kind, ROWS, WIDTH, "plain", False)(x, weights, y)
        return y
    group = stored_group(precision, WIDTH)
    types = (np.int32, np.float32 if rounding == "group" else np.int32, np.int32)
    tensors = [
        aligned(np.empty((COUNT, size), dtype))
        for size, dtype in zip((WIDTH // 4, WIDTH // group, WIDTH // group), types, strict=True)
    ]
    tensors += [] if rounding == "group" else [aligned(np.empty(COUNT, np.float32))]
    kernel("quantize", WIDTH, group, rounding)(x, *tensors)
    based = precision.weight_only if activation_rounding(precision.weight_only) != "group" else precision
    kernel("linear_int", based, ROWS, WIDTH, "plain", False)(*tensors, weights, y)
    return y


@pytest.mark.parametrize("name", CELLS)
def test_every_precision_is_multiplied_as_its_recipe_says(name):
    """Weights rounded to nearest, packed, multiplied, against float64 with the dequantized weights and the inputs as
    parity rounds them."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("tvm", reason="apache-tvm is not installed")
    from exporter.parity.activations import round_activations

    assert capabilities()[name].usable
    precision, random = CELLS[name], np.random.default_rng(0)
    values = random.normal(0, 0.05, (ROWS, WIDTH)).astype(np.float32)
    rows = quantize_rows(values, precision) if precision.is_coded else stored_floats(values, precision.kind)
    x = random.normal(size=(COUNT, WIDTH)).astype(np.float32)
    wide = rows.dequantize() if isinstance(rows, QuantizedRows) else rows.astype(np.float32)
    rounding, seen = activation_rounding(precision), x
    if rounding is not None:
        group = stored_group(precision, WIDTH) if multiplies_integers(precision) else WIDTH
        seen = round_activations(torch.from_numpy(x), group, rounding).numpy()
    found = product(precision, x, packed_weights(precision, rows))
    expected = seen.astype(np.float64) @ wide.astype(np.float64).T
    # Levels of nf4 are whole numbers of 16 bits; everything else is exact but for float32 sums.
    limit = 1e-4 if precision.kind == "nf4" else 1e-6
    assert np.linalg.norm(found - expected) <= limit * np.linalg.norm(expected)


def stored_floats(values: np.ndarray, kind: str) -> np.ndarray:
    return values.astype({"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[kind])


def config(**changes: object) -> ModelConfig:
    return parse_config({**BASE, "model_type": "llama", **changes})


def test_rows_that_no_group_divides_are_refused():
    for precision, level in ((Precision("int8", CHANNEL), "refused"), (Precision("fp8", CHANNEL), "emulated")):
        answer = recipe_support(config(hidden_size=72, head_dim=18), Recipe("r", precision, FP32, FP32))
        assert answer.level == level
        assert ("72" in answer.why) == (level == "refused")
    with pytest.raises(UnsupportedError, match="no group of the kernels divides a matrix of 72"):
        layout(Precision("int4", CHANNEL), 32, 72, PROFILES["x86-64-v3"])


def test_a_recipe_is_as_good_as_its_weakest_part():
    overrides = (Override("layers.1.*", Precision("fp8", CHANNEL)),)
    recipe = Recipe("r", Precision("int4", 32), FP32, FP32, overrides=overrides)
    assert recipe_support(config(), recipe).level == "emulated"
    for kind in ("fp8", "bf16"):
        assert recipe_support(config(), replace(recipe, kv_cache=kind)).level == "refused"


def test_an_fp8_cache_is_refused_by_a_build_too(tiny_checkpoint, tmp_path):
    pytest.importorskip("tvm", reason="apache-tvm is not installed")
    assert capabilities()["kv-cache fp8"].level == "refused"
    with pytest.raises(UnsupportedError, match="fp8"):
        build_tvm(tvm_source(tiny_checkpoint("gqa"), "fp32", "fp8"), tmp_path)
