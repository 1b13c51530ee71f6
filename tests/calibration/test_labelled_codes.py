"""Codes that were chosen for a whole head serve a head of some of its rows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calibration.calibrate import CalibrateOptions, calibrate
from calibration.labelled_codes import LabelledCodes, labelled_codes
from calibration.qparams import QParams
from calibration.weight_rows import WeightRows
from exporter.calibrating import load_data
from exporter.calibration_request import CalibrationRequest
from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import EMBEDDING, HEAD, Checkpoint
from exporter.core.labelled import LabelledCheckpoint, labelled
from exporter.core.progress import NoProgress
from exporter.core.recipe import Precision, Recipe
from exporter.core.task import Task
from exporter.core.weights import QuantizedRows
from exporter.recipe_numbers import calibrated_numbers
from targets.onnxruntime.target import OnnxRuntimeTarget

Factory = Callable[..., Path]
IDS = (300, 2, 17)
TASK = Task("classify", ("a", "b", "c"), IDS)
INT4, INT8 = Precision("int4", 32), Precision("int8", 32)
TEXT = Path(__file__).parents[1] / "support" / "tiny.py"
CODED = ("int4", "asymmetric", "rotated")


def recipe_of(name: str) -> Recipe:
    head = Precision("int4", 16, symmetric=False) if name == "asymmetric" else INT4
    algorithms = ("rotate", "gptq") if name == "rotated" else ("gptq",)
    return Recipe(name, INT4, head, head, algorithms=algorithms)


def calibrated(checkpoint: Checkpoint, recipe: Recipe, out: Path) -> QParams:
    data = load_data(checkpoint, CalibrationRequest(text=TEXT, tokens=256), 64)
    calibrate(checkpoint, recipe, data, out, CalibrateOptions(threads=1), NoProgress())
    return QParams.open(out)


def head(rows: WeightRows, name: str, precision: Precision, count: int) -> QuantizedRows:
    found = rows(CheckpointWeight((name,), precision), 0, count)
    assert isinstance(found, QuantizedRows)
    return found


@pytest.mark.parametrize("shape", ["gqa", "tied"])
@pytest.mark.parametrize("name", CODED)
def test_a_plain_calibration_serves_the_labels(tiny_checkpoint: Factory, tmp_path: Path, shape: str, name: str) -> None:
    whole, recipe = Checkpoint.open(tiny_checkpoint(shape)), recipe_of(name)
    parameters = calibrated(whole, recipe, tmp_path / "q")
    target = OnnxRuntimeTarget()
    plain = calibrated_numbers(whole, recipe, parameters, target, 1)
    few = calibrated_numbers(labelled(whole, TASK), recipe, parameters, target, 1)
    assert isinstance(plain.rows, WeightRows) and isinstance(few.rows, WeightRows)
    expected = head(plain.rows, plain.checkpoint.config.head_source, recipe.lm_head, 320)
    found = head(few.rows, HEAD, recipe.lm_head, len(IDS))
    chosen = list(IDS)
    np.testing.assert_array_equal(found.codes, expected.codes[chosen])
    np.testing.assert_array_equal(found.scales, expected.scales[chosen])
    np.testing.assert_array_equal(found.dequantize(), expected.dequantize()[chosen])
    for tensor in (EMBEDDING, "model.layers.1.mlp.up_proj.weight"):
        one, other = (head(rows, tensor, recipe.linear, 100) for rows in (plain.rows, few.rows))
        np.testing.assert_array_equal(one.codes, other.codes)


def test_a_file_without_codes_of_the_head_leaves_it_to_rounding(tiny_checkpoint: Factory) -> None:
    class Empty:
        def rows(self, tensor: str, precision: Precision, start: int, stop: int) -> None:
            return None

    view = labelled(Checkpoint.open(tiny_checkpoint("gqa")), TASK)
    assert isinstance(view, LabelledCheckpoint)
    stored = labelled_codes(Empty(), view, ())
    assert stored == LabelledCodes(stored.stored, HEAD, IDS)
    assert stored.rows(HEAD, INT4, 0, 3) is None and stored.rows(EMBEDDING, INT4, 0, 3) is None
    rounded = head(WeightRows(view, 1, stored), HEAD, INT8, 3)
    np.testing.assert_array_equal(rounded.codes, head(WeightRows(view, 1), HEAD, INT8, 3).codes)
