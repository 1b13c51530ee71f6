"""Quantized slices as parity runs them: a layer at a time, some rows of the embedding, the head in blocks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calibration.insert_precision import apply_recipe
from calibration.weight_rows import WeightRows
from exporter.core.canonical import CanonicalModel
from exporter.core.checkpoint import Checkpoint
from exporter.core.recipe import Precision
from exporter.parity import graph_slice
from exporter.parity.graph_slice import SliceRunner
from targets.onnxruntime.slice_session import SliceSession
from tests.calibration.test_insert_precision import MAX_SEQ_LEN, activations, input_scales, stored_and_plain, uniform
from tests.support.canonical_llama import canonical_llama

Factory = Callable[..., Path]
PRECISIONS = [
    Precision("int4", 32),
    Precision("int8", -1, activations="int8/tensor"),
    Precision("int8", -1, activations="int8/token"),
    Precision("fp8", 0, activations="fp8/tensor"),
    Precision("nf4", 64),
    Precision("nvfp4", 16),
    Precision("mxfp4", 32),
]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Factory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint("gqa"))


def quantized(checkpoint: Checkpoint, precision: Precision) -> CanonicalModel:
    config = checkpoint.config
    return apply_recipe(canonical_llama(config, MAX_SEQ_LEN), uniform(precision), config, input_scales(config))


@pytest.mark.parametrize("precision", PRECISIONS, ids=Precision.describe)
def test_slices_run_as_on_a_plain_session(checkpoint: Checkpoint, precision: Precision) -> None:
    """Weights are made ready once, vocabularies go in parts: the numbers are those of the whole graph at once."""
    config, rows = checkpoint.config, WeightRows(checkpoint)
    model, runner = quantized(checkpoint, precision), SliceRunner(config, rows)

    ids = np.array([3, 17, 200, 3])
    whole = SliceSession(model.embedding.structure)
    expected = whole.run({"input_ids": ids[None], **stored_and_plain(model.embedding, rows)[0]})["hidden"][0]
    np.testing.assert_array_equal(runner.embed(model.embedding, [ids])[0], expected)

    layer, feeds = model.layers[1], activations(config, "layer")
    expected = SliceSession(layer.structure).run({**feeds, **stored_and_plain(layer, rows)[0]})["hidden_out"]
    ready = runner.layer(layer)
    found = ready.compiled.run(ready.weights, feeds, ["hidden_out"])["hidden_out"]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("precision", PRECISIONS, ids=Precision.describe)
def test_the_head_in_blocks(checkpoint: Checkpoint, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    config, rows = checkpoint.config, WeightRows(checkpoint)
    model, runner = quantized(checkpoint, precision), SliceRunner(config, rows)
    blocks = [(0, 100), (100, 319), (319, 320)]
    monkeypatch.setattr(graph_slice, "row_chunks", lambda shape: iter(blocks))
    hidden = activations(config, "head")["hidden"][0]
    found = np.concatenate(list(runner.logit_columns(model.head, hidden)), axis=1)
    feeds = {"hidden": hidden[None], "rows": np.arange(len(hidden)), **stored_and_plain(model.head, rows)[0]}
    expected = SliceSession(model.head.structure).run(feeds)["logits"]
    # Matrix products over other numbers of columns may sum in another order.
    np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=0, atol=2e-6 * np.abs(expected).max())
