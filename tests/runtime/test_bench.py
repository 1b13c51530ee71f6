"""The benchmark: the contract's object, what is measured, and the arithmetic beside it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exporter.core.errors import InputError
from exporter.core.recipe import Precision, Recipe
from exporter.runtime import bench as module
from exporter.runtime import engine as engine_module
from exporter.runtime.bench import bench, bytes_per_step, peak_rss_bytes, reset_peak
from exporter.runtime.memory_bandwidth import measure_bandwidth
from targets.base import Limits, RunOptions
from tests.artifact.sample import config, manifest
from tests.runtime.fake_runner import FakeRunner
from tests.runtime.test_engine import FakeTarget, write_engine

# The contract, in the order of the design.
FIELDS = [
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "load_seconds",
    "weights_bytes",
    "peak_rss_bytes",
    "threads",
    "memory_bandwidth_bytes_per_s",
    "decode_bandwidth_fraction",
    "batch",
    "context",
]


@pytest.fixture(scope="module")
def directory(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tiny_checkpoint("gqa"), tmp_path_factory.mktemp("bench") / "fake")


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeRunner]:
    made: list[FakeRunner] = []

    class Recording(FakeTarget):
        def runner(self, *arguments: object) -> FakeRunner:
            made.append(super().runner(*arguments))  # type: ignore[arg-type]
            return made[-1]

    monkeypatch.setattr(engine_module, "get_target", lambda name: Recording())
    monkeypatch.setattr(module, "measure_bandwidth", lambda threads: 1e9 * threads)
    return made


def test_the_object_of_the_contract(directory: Path, fakes: list[FakeRunner]) -> None:
    found = bench(directory, prompt_tokens=8, new_tokens=4, batch=2, threads=1)
    assert list(found) == FIELDS
    assert (found["batch"], found["context"], found["threads"], found["weights_bytes"]) == (2, 0, 1, 4096)
    assert all(isinstance(value, int | float) and value > 0 for name, value in found.items() if name != "context")
    runner = fakes[0]
    assert runner.closed and runner.calls.count("decode") == module.REPETITIONS * 4
    assert list(runner.lengths) == [8, 8]


def test_context_is_what_decoding_follows(directory: Path, fakes: list[FakeRunner]) -> None:
    found = bench(directory, prompt_tokens=4, new_tokens=4, context=30)
    assert found["context"] == 30 and list(fakes[0].lengths) == [30]


def test_tokens_are_seeded_and_various() -> None:
    ids = module._tokens(manifest(), 2, 100)
    assert np.array_equal(ids, module._tokens(manifest(), 2, 100))
    assert len(np.unique(ids)) > 50 and ids.min() >= 0 and ids.max() < 320


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"prompt_tokens": 49}, "run.too_long"),
        ({"prompt_tokens": 40, "new_tokens": 9}, "run.too_long"),
        ({"prompt_tokens": 4, "new_tokens": 9, "context": 40}, "run.too_long"),
        ({"prompt_tokens": 0}, "usage.prompt_tokens"),
        ({"new_tokens": 0}, "usage.new_tokens"),
        ({"context": -1}, "usage.context"),
        ({"batch": 4}, "run.batch"),
    ],
)
def test_bad_options(directory: Path, options: dict[str, int], kind: str) -> None:
    with pytest.raises(InputError) as caught:
        bench(directory, **options)
    assert caught.value.kind == kind


def test_bytes_per_step_counts_every_weight_once() -> None:
    fp32 = Recipe("fp32", Precision(), Precision(), Precision())
    shape = config()
    table = shape.vocab_size * shape.hidden_size
    plain = bytes_per_step(manifest(recipe=fp32), 1, 0)
    assert plain == 4 * (shape.parameter_count - table)
    tied = manifest(recipe=fp32, source=type(manifest().source)("ab" * 32, config(tie_word_embeddings=True)))
    assert bytes_per_step(tied, 1, 0) == plain
    per_position = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
    assert bytes_per_step(manifest(recipe=fp32), 3, 10) == plain + 3 * 10 * per_position


def test_bytes_per_step_of_four_bits() -> None:
    shape = config()
    vectors = (2 * shape.num_layers + 1) * shape.hidden_size
    matrices = shape.parameter_count - vectors - shape.vocab_size * shape.hidden_size
    int4 = Precision("int4", 32)
    found = bytes_per_step(manifest(recipe=Recipe("r", int4, int4, Precision("int8", 32))), 1, 0)
    assert found == matrices * (0.5 + 4 / 32) + 4 * vectors


def test_bandwidth_reads_the_whole_buffer_in_each_thread_count() -> None:
    for threads in (1, 3):
        assert measure_bandwidth(threads, buffer_bytes=1_000_001, repetitions=2) > 0


def test_peak_memory_sees_an_allocation_and_can_be_reset() -> None:
    block = np.ones(64 << 20, np.uint8)
    high = peak_rss_bytes()
    assert high >= block.nbytes
    del block
    reset_peak()
    assert peak_rss_bytes() <= high


def test_the_fake_runner_refuses_what_real_ones_refuse() -> None:
    with pytest.raises(InputError):
        FakeRunner(10, Limits(1, 2), RunOptions()).prefill(np.zeros((1, 3), np.int64), np.array([3]))
