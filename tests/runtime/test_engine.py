"""A loaded engine with a runner whose answers are known: prompts, chat, streaming, limits, no torch."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from exporter.artifact.manifest import Source, write_manifest
from exporter.artifact.tokenizer_files import read_tokenizer
from exporter.core.config import ModelConfig
from exporter.core.errors import ArtifactError, InputError, UnsupportedError
from exporter.runtime import engine as engine_module
from exporter.runtime.engine import Engine, load
from exporter.runtime.sampling import Sampling
from targets.base import Limits, RunOptions
from tests.artifact.sample import manifest
from tests.runtime.fake_runner import FakeRunner, reference

ROOT = Path(__file__).parents[2]
EOS = 1


class FakeTarget:
    """Builds nothing and runs `FakeRunner`."""

    def runner(self, engine_dir: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> FakeRunner:
        assert options.threads > 0 and (engine_dir / "tokenizer.json").is_file()
        return FakeRunner(config.vocab_size, limits, options)


def write_engine(checkpoint: Path, out: Path) -> Path:
    out.mkdir()
    config = ModelConfig.from_directory(checkpoint)
    read_tokenizer(checkpoint, config).write(out)
    write_manifest(out, manifest(source=Source("cd" * 32, config), limits=Limits(3, 48)))
    return out


@pytest.fixture(scope="module")
def directory(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tiny_checkpoint("gqa"), tmp_path_factory.mktemp("engines") / "fake")


@pytest.fixture(autouse=True)
def fake_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "get_target", lambda name: FakeTarget())


@pytest.fixture
def engine(directory: Path) -> Iterator[Engine]:
    with load(directory, batch=3) as loaded:
        yield loaded


def test_text_and_ids_give_the_same_answer(engine: Engine) -> None:
    by_text = engine.generate("def f(x):", max_new_tokens=8)
    ids = engine.tokenizer.encode("def f(x):")
    assert by_text == engine.generate(ids, max_new_tokens=8) == engine.generate(np.array(ids), max_new_tokens=8)
    assert list(by_text.prompt_ids) == ids
    assert list(by_text.output_ids) == reference(ids, 8, {EOS}, 320)
    assert by_text.to_json().keys() == {"prompt_ids", "output_ids", "text", "finish_reason"}


def test_streamed_text_is_the_answer(engine: Engine) -> None:
    pieces: list[str] = []
    answer = engine.generate("import os", max_new_tokens=20, on_text=pieces.append)
    assert "".join(pieces).replace("\ufffd", "") == answer.text.replace("\ufffd", "") and all(pieces)


def test_a_stop_token_is_counted_but_not_shown(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    target = np.eye(320, dtype=np.float32)
    made = engine.runner
    assert isinstance(made, FakeRunner)
    plan = [*engine.tokenizer.encode("ok"), EOS]
    monkeypatch.setattr(made, "logits", lambda tokens: target[plan[min(len(tokens) - 3, len(plan) - 1)]])
    answer = engine.generate([5, 6, 7])
    assert (list(answer.output_ids), answer.text, answer.finish_reason) == (plan, "ok", "stop")


def test_batches_equal_single_prompts(engine: Engine) -> None:
    prompts = ["a", "some longer prompt", "x y"]
    together = engine.generate_batch(prompts, max_new_tokens=6)
    assert together == [engine.generate(prompt, max_new_tokens=6) for prompt in prompts]


def test_chat_goes_through_the_template_without_more_special_tokens(engine: Engine) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    answer = engine.chat(messages, max_new_tokens=4, sampling=Sampling(1.0, seed=3))
    assert list(answer.prompt_ids) == engine.tokenizer.encode("user: Hello\n", add_special_tokens=False)


def test_an_empty_prompt_starts_from_the_first_token(engine: Engine) -> None:
    assert engine.generate("", max_new_tokens=2).prompt_ids == (0,)
    with pytest.raises(InputError) as caught:
        engine.generate([], max_new_tokens=2)
    assert caught.value.kind == "run.empty_prompt"


@pytest.mark.parametrize("ids", [[-1], [320], [True], [1.5], ["1"], [1 << 70]])
def test_ids_outside_the_vocabulary(engine: Engine, ids: list[int]) -> None:
    with pytest.raises(InputError) as caught:
        engine.generate(ids)
    assert caught.value.kind == "run.token_id"


def test_a_prompt_beyond_the_limit(engine: Engine) -> None:
    with pytest.raises(InputError, match=r"49 tokens.*48") as caught:
        engine.generate([5] * 49)
    assert caught.value.kind == "run.too_long" and caught.value.exit_code == 2
    assert len(engine.generate([5] * 40, max_new_tokens=100).output_ids) <= 8


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"batch": 0}, "run.batch"), ({"batch": 4}, "run.batch"), ({"threads": -1}, "usage.threads")],
)
def test_bad_options(directory: Path, options: dict[str, int], kind: str) -> None:
    with pytest.raises(InputError) as caught:
        load(directory, **options)  # type: ignore[arg-type]
    assert caught.value.kind == kind


def test_the_expected_digest(directory: Path) -> None:
    with load(directory) as loaded:
        assert loaded.batch == 1 and loaded.threads >= 1
        digest = loaded.digest
    load(directory, expect_digest=digest).close()
    with pytest.raises(ArtifactError):
        load(directory, expect_digest="0" * 64)


def test_leaving_the_block_closes_the_runner(directory: Path) -> None:
    with load(directory) as loaded:
        runner = loaded.runner
    assert isinstance(runner, FakeRunner) and runner.closed


def test_memory_that_is_not_there(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(FakeTarget, "runner", refuse)
    with pytest.raises(UnsupportedError) as caught:
        load(directory)
    assert caught.value.kind == "run.memory"


SCRIPT = """
import sys
from pathlib import Path
import exporter.runtime.engine as module
from tests.runtime.fake_runner import FakeRunner

class Target:
    def runner(self, directory, config, limits, options):
        return FakeRunner(config.vocab_size, limits, options)

module.get_target = lambda name: Target()
with module.load(Path(sys.argv[1])) as engine:
    engine.chat([{"role": "user", "content": "Hello"}], max_new_tokens=3)
heavy = [name for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "jinja2") if name in sys.modules]
assert not heavy, heavy
"""


def test_loading_and_running_import_no_heavy_library(directory: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(directory)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
