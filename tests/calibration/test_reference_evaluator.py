"""Quantized heads on ONNX's own reference evaluator: what is inserted is standard ONNX, and means what we say."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from calibration.insert_precision import apply_recipe
from calibration.weight_rows import WeightRows
from exporter.core.canonical import Slice
from exporter.core.checkpoint import Checkpoint
from exporter.core.recipe import Precision, all_precisions
from tests.calibration.test_insert_precision import (
    MAX_SEQ_LEN,
    activations,
    input_scales,
    rounded_products,
    simulated,
    stored_and_plain,
    uniform,
)
from tests.support.canonical_llama import canonical_llama

Factory = Callable[..., Path]
# The evaluator takes small types as ml_dtypes has them.
TYPES = {"INT4": ml_dtypes.int4, "UINT4": ml_dtypes.uint4, "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn}
CODED = [p for p in all_precisions() if p.is_coded and p.group_size in (16, 32, 0, -1)]
PLAIN = [p for p in CODED if not p.activations]
ROUNDED = [p for p in CODED if p.activations and p.group_size != 16]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Factory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint("gqa"))


def quantized_head(checkpoint: Checkpoint, precision: Precision) -> tuple[Slice, dict[str, np.ndarray]]:
    """The head, and feeds for it with the types that the evaluator wants."""
    config = checkpoint.config
    plain = canonical_llama(config, MAX_SEQ_LEN)
    head = apply_recipe(plain, uniform(precision), config, input_scales(config)).head
    feeds = {**activations(config, "head"), **stored_and_plain(head, WeightRows(checkpoint))[0]}
    for value in head.structure.graph.inputs:
        name, kind = value.name or "", value.dtype.name if value.dtype else ""
        if kind in TYPES:
            feeds[name] = feeds[name].view(TYPES[kind]) if kind.startswith("FLOAT") else feeds[name].astype(TYPES[kind])
    return head, feeds


def evaluated(head: Slice, feeds: dict[str, np.ndarray], names: list[str]) -> list[np.ndarray]:
    proto = ir.to_proto(head.structure)
    del proto.graph.output[:]
    for name in names:
        proto.graph.output.add(name=name)
    found: list[np.ndarray] = ReferenceEvaluator(proto).run(None, feeds)
    return found


@pytest.mark.parametrize("precision", PLAIN, ids=Precision.describe)
def test_weights_are_restored_exactly(checkpoint: Checkpoint, precision: Precision) -> None:
    head, feeds = quantized_head(checkpoint, precision)
    (weight,) = evaluated(head, feeds, ["lm_head.weight"])
    _, expected = stored_and_plain(head, WeightRows(checkpoint))
    np.testing.assert_array_equal(weight, expected["lm_head.weight"])


@pytest.mark.parametrize("precision", ROUNDED, ids=Precision.describe)
def test_inputs_are_rounded_exactly(checkpoint: Checkpoint, precision: Precision) -> None:
    """Fed with the evaluator's own norm, so that its sums may differ from ours."""
    head, feeds = quantized_head(checkpoint, precision)
    ((product, match),) = rounded_products(head)
    assert match.source.name and product.inputs[0] is not None and product.inputs[0].name
    source, rounded = evaluated(head, feeds, [match.source.name, product.inputs[0].name])
    np.testing.assert_array_equal(rounded, simulated(source, match, feeds))
