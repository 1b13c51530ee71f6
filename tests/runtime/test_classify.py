"""A loaded classifier with a runner whose logits are known: labels, batches, limits, what is refused, the benchmark."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.artifact.manifest import Source, write_manifest
from exporter.artifact.tokenizer_files import read_tokenizer
from exporter.cli.answers import Answering, Question, classify_answer
from exporter.cli.output import Output
from exporter.core.config import ModelConfig
from exporter.core.errors import EngineSmithError, InputError
from exporter.core.task import Task
from exporter.runtime import bench as bench_module
from exporter.runtime import engine as engine_module
from exporter.runtime.bench import bench, bench_to_fit
from exporter.runtime.engine import Engine, load
from targets.base import Limits, RunOptions
from tests.artifact.sample import manifest
from tests.runtime.fake_runner import FakeRunner

TASK = Task("classify", ("safe", "unsafe", "unsure"), (7, 300, 44))
PROMPTS = ["def f(x):", "return the sum", "a", "import os and more", "x"]


class FakeTarget:
    """Builds nothing and runs `FakeRunner`, with as many logits as the engine's head has rows."""

    def runner(self, engine_dir: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> FakeRunner:
        return FakeRunner(config.head_size, limits, options)


def write_engine(checkpoint: Path, out: Path, task: Task) -> Path:
    out.mkdir()
    config = ModelConfig.from_directory(checkpoint)
    read_tokenizer(checkpoint, config).write(out)
    write_manifest(out, manifest(source=Source("cd" * 32, config), limits=Limits(3, 48), task=task))
    return out


@pytest.fixture(scope="module")
def directory(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tiny_checkpoint("tied"), tmp_path_factory.mktemp("classifier") / "fake", TASK)


@pytest.fixture(autouse=True)
def fake_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "get_target", lambda name: FakeTarget())
    monkeypatch.setattr(bench_module, "measure_bandwidth", lambda threads: 1e9)


@pytest.fixture
def engine(directory: Path) -> Iterator[Engine]:
    with load(directory, batch=2) as loaded:
        yield loaded


def test_labels_and_probabilities(engine: Engine) -> None:
    (found,) = engine.classify([[5, 6, 7]])
    logits = np.random.default_rng([5, 6, 7]).standard_normal(3).astype(np.float32)
    expected = torch.softmax(torch.from_numpy(logits).double(), 0).numpy()
    assert found.label == TASK.labels[int(logits.argmax())] and found.token_id == TASK.token_ids[int(logits.argmax())]
    assert list(found.logits) == list(found.probabilities) == list(TASK.labels)
    np.testing.assert_array_equal(list(found.logits.values()), logits)
    np.testing.assert_allclose(list(found.probabilities.values()), expected, rtol=1e-14)
    assert json.loads(json.dumps(found.to_json())).keys() == {
        "prompt_ids",
        "label",
        "token_id",
        "probabilities",
        "logits",
    }
    assert found.describe().splitlines()[0] == found.label


def test_any_number_of_prompts_in_their_order(engine: Engine) -> None:
    """Five prompts of five lengths through two rows: each gets what it gets alone."""
    together = engine.classify(PROMPTS)
    assert together == [engine.classify([prompt])[0] for prompt in PROMPTS]
    assert [list(found.prompt_ids) for found in together] == [engine.tokenizer.encode(text) for text in PROMPTS]
    assert engine.classify([engine.encode(text) for text in PROMPTS]) == together
    assert engine.classify([]) == []
    assert isinstance(engine.runner, FakeRunner) and set(engine.runner.calls) == {"prefill"}


def test_a_conversation_goes_through_the_template(engine: Engine) -> None:
    found = engine.classify_chat([{"role": "user", "content": "hello"}])
    assert found == engine.classify([engine.tokenizer.encode("user: hello\n", add_special_tokens=False)])[0]


@pytest.mark.parametrize(
    ("kind", "prompts"),
    [
        ("run.empty_prompt", [[5], []]),
        ("run.too_long", [[5] * 49]),
        ("run.token_id", [[320]]),
        ("run.prompt", "one text"),
    ],
)
def test_bad_prompts(engine: Engine, kind: str, prompts: list[list[int]]) -> None:
    with pytest.raises(InputError) as caught:
        engine.classify(prompts)
    assert caught.value.kind == kind


def test_what_generates_is_refused(engine: Engine) -> None:
    for call in (
        lambda: engine.generate("a"),
        lambda: engine.generate_batch(["a"]),
        lambda: engine.chat([{"role": "user", "content": "hello"}]),
    ):
        with pytest.raises(InputError, match="'safe', 'unsafe', 'unsure' apart") as caught:
            call()
        assert caught.value.kind == "run.task"


def test_a_generator_has_no_labels(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with load(write_engine(tiny_checkpoint("tied"), tmp_path / "plain", Task())) as generator:
        with pytest.raises(InputError) as caught:
            generator.classify(["a"])
        with pytest.raises(InputError):
            generator.classify_chat([{"role": "user", "content": "a"}])
    assert caught.value.kind == "run.task"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers(engine: Engine, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    monkeypatch.setattr(engine.runner, "logits", lambda tokens: np.array([0.0, bad, 1.0], np.float32))
    with pytest.raises(EngineSmithError) as caught:
        engine.classify(["a"])
    assert caught.value.kind == "run.not_finite"


def test_of_equal_logits_the_first_label_wins(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.runner, "logits", lambda tokens: np.array([1e4, 3e4, 3e4], np.float32))
    (found,) = engine.classify(["a"])
    assert found.label == "unsafe" and list(found.probabilities.values()) == [0.0, 0.5, 0.5]


def test_the_benchmark_measures_calls(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "CLASSIFICATIONS", 12)
    found = bench(directory, prompt_tokens=40, batch=2, threads=1)
    assert found["decode_tokens_per_s"] is found["decode_bandwidth_fraction"] is None
    latency = found["classify_latency_seconds"]
    assert 0 < latency["median"] <= latency["p99"]
    assert found["prefill_tokens_per_s"] == pytest.approx(2 * 40 / latency["median"])
    assert list(found)[-1] == "classify_latency_seconds"
    for options in ({"new_tokens": 4}, {"context": 4}):
        with pytest.raises(InputError) as caught:
            bench(directory, prompt_tokens=8, **options)
        assert caught.value.kind == "run.task"
    with pytest.raises(InputError, match="needs 49 positions"):
        bench(directory, prompt_tokens=49)
    with load(directory) as opened:
        assert bench_to_fit(opened.artifact)["decode_tokens_per_s"] is None


def test_lines_of_standard_input(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", iter(["hello\n", "there\n"]))
    shown: list[str] = []
    output = Output([])
    monkeypatch.setattr(output, "stream", shown.append)
    classify_answer(engine, Question(None, None, True), Answering(), output)
    expected = [engine.classify_chat([{"role": "user", "content": text}]).describe() for text in ("hello", "there")]
    assert shown == [f"{text}\n" for text in expected]


@pytest.mark.parametrize("given", [{"temperature": 0.0}, {"max_new_tokens": 1}, {"seed": 0, "top_p": 1.0}])
def test_options_of_generating_are_refused(engine: Engine, given: dict[str, float]) -> None:
    flags = [f"--{name.replace('_', '-')}" for name in given]
    with pytest.raises(InputError, match=f"generates nothing: {', '.join(sorted(flags, reverse=True))}") as caught:
        classify_answer(engine, Question("a", None, False), Answering(**given), Output([]))
    assert caught.value.kind == "run.task"
