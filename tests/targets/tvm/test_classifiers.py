"""Classifiers of TVM against transformers' own logits of the labels, and what engine.json says of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter.core.errors import ArtifactError
from targets.base import RunOptions
from targets.registry import get_target
from targets.tvm.engine_files import read_index
from targets.tvm.file_names import INDEX
from targets.tvm.runner import TvmRunner
from tests.conftest import CheckpointFactory
from tests.targets.classifiers import LENGTHS, classifier, label_logits, task_of
from tests.targets.engines import Engine, random_ids, relative_l2
from tests.targets.tvm.builds import EngineFactory, build_tvm, tvm_source

# float32 on both sides, sums of at most 128 terms in another order.
ROUNDING = 2e-5


@pytest.fixture(scope="module", autouse=True)
def needs_tvm() -> None:
    pytest.importorskip("tvm", reason="apache-tvm is not installed: no engine can be compiled")


def opened(engine: Engine, batch: int) -> TvmRunner:
    options = RunOptions(threads=2, batch=batch)
    runner = get_target("tvm").runner(engine.path, engine.config, engine.source.limits, options)
    assert isinstance(runner, TvmRunner)
    return runner


@pytest.mark.parametrize(
    ("shape", "recipe", "ids"),
    [
        ("gqa", "fp32", (7, 300)),
        ("tied", "bf16", (0, 319, 45)),
        ("biases", "fp16", tuple(range(60, 101))),
        ("odd_vocabulary", "fp32", (332, 1)),
    ],
)
def test_labels_are_those_of_transformers(
    tiny_checkpoint: CheckpointFactory, tmp_path: Path, shape: str, recipe: str, ids: tuple[int, ...]
) -> None:
    plain, task = tvm_source(tiny_checkpoint(shape), recipe), task_of(*ids)
    prompts = random_ids(plain.config, 3, 30)
    engine = build_tvm(classifier(plain, task), tmp_path)
    index = read_index(engine.path)
    assert (index.head_size, index.vocab_size) == (len(ids), plain.config.vocab_size)
    assert engine.result.signature["outputs"]["logits"]["shape"] == ["wanted", len(ids)]
    with opened(engine, 3) as runner:
        logits = runner.prefill(prompts, LENGTHS)
    assert relative_l2(logits, label_logits(plain, task, prompts)) <= ROUNDING
    with opened(engine, 1) as runner:
        alone = [runner.prefill(row[None, :n], np.array([n]))[0] for row, n in zip(prompts, LENGTHS, strict=True)]
    assert relative_l2(np.stack(alone), logits) <= ROUNDING


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_coded_heads_of_few_rows_equal_those_of_the_whole_vocabulary(
    tiny_checkpoint: CheckpointFactory, tvm_engine: EngineFactory, tmp_path: Path, recipe: str
) -> None:
    """The same codes, the same activations: the labels' logits are the generator's own."""
    whole, task = tvm_engine("odd_vocabulary", recipe), task_of(7, 331, 40)
    few = build_tvm(classifier(tvm_source(tiny_checkpoint("odd_vocabulary"), recipe), task), tmp_path)
    prompts = random_ids(whole.config, 3, 30)
    with opened(whole, 3) as runner:
        expected = runner.prefill(prompts, LENGTHS)[:, list(task.token_ids)]
    with opened(few, 3) as runner:
        assert relative_l2(runner.prefill(prompts, LENGTHS), expected) <= ROUNDING


def test_an_index_without_head_size_is_a_generators(tvm_engine: EngineFactory, tmp_path: Path) -> None:
    """As engines of versions that knew no classifiers have it."""
    fields = json.loads((tvm_engine().path / INDEX).read_text())
    assert fields.pop("head_size") == 320
    (tmp_path / INDEX).write_text(json.dumps(fields))
    assert read_index(tmp_path).head_size == 320


def test_an_engine_of_another_task_is_refused(tvm_engine: EngineFactory) -> None:
    engine = tvm_engine()
    config = replace(engine.config, head_rows=2, tie_word_embeddings=False)
    with pytest.raises(ArtifactError, match="head_size 320, the model's configuration 2"):
        get_target("tvm").runner(engine.path, config, engine.source.limits, RunOptions(threads=1))
