"""Classifiers of ONNX Runtime against transformers' own logits of the labels, in every shape and precision."""

from pathlib import Path

import numpy as np
import pytest

from targets.onnxruntime import matmul
from tests.conftest import CheckpointFactory
from tests.support.tiny import SHAPES
from tests.targets.classifiers import LENGTHS, classifier, label_logits, task_of
from tests.targets.engines import RECIPES, build, build_source, random_ids, relative_l2

# float32 on both sides, sums of at most 128 terms in another order, as for generators (test_engine_parity.py).
ROUNDING = 2e-5
TASKS = [task_of(7, 300), task_of(0, 319, 45), task_of(*range(60, 101))]


def hold(checkpoint: Path, recipe: str, labels: int, out: Path) -> None:
    plain, task = build_source(checkpoint, RECIPES[recipe]), TASKS[labels]
    ids = random_ids(plain.config, 3, 30)
    engine = build(classifier(plain, task), out)
    assert not (out / "genai_config.json").exists()
    assert engine.result.files == ["model.onnx", "model.onnx.data"]
    assert engine.result.signature["outputs"]["logits"]["shape"] == ["batch", 1, len(task.labels)]
    with engine.runner(batch=3) as runner:
        logits = runner.prefill(ids, LENGTHS)
    assert relative_l2(logits, label_logits(plain, task, ids)) <= ROUNDING
    with engine.runner(batch=1) as runner:
        alone = [runner.prefill(row[None, :n], np.array([n]))[0] for row, n in zip(ids, LENGTHS, strict=True)]
    assert relative_l2(np.stack(alone), logits) <= ROUNDING


@pytest.mark.parametrize("labels", range(len(TASKS)))
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(tiny_checkpoint: CheckpointFactory, tmp_path: Path, shape: str, labels: int) -> None:
    hold(tiny_checkpoint(shape), "fp32", labels, tmp_path)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", ["tied", "odd_vocabulary", "biases"])
def test_every_precision_of_the_head(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, recipe: str
) -> None:
    """With float activations nothing but rounding separates the engine from eager with the recipe's values."""
    monkeypatch.setattr(matmul, "INT8_ACTIVATIONS", 0)
    hold(tiny_checkpoint(shape), recipe, 1, tmp_path)
