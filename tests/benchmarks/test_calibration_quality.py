"""What the quality table rests on: scorers that are the eager model where nothing is rounded, and honest text."""

import json
from pathlib import Path

import numpy as np
import pytest

from exporter.core.checkpoint import Checkpoint
from exporter.core.recipe import Precision, Recipe
from exporter.recipe_numbers import plain_numbers
from tests.benchmarks import calibration_llama, calibration_ours, calibration_text, gguf_checkpoint, quality
from tests.benchmarks.calibration_text import corpus_of
from tests.benchmarks.make_checkpoint import make_checkpoint
from tests.benchmarks.modelopt_scales import E4M3_TOP, differences
from tests.benchmarks.quality import compare, eager

EXAMPLE = Path(__file__).parents[2] / "examples" / "stdlib-llama"
IDS = np.random.default_rng(0).integers(2, 200, 40)
FP32 = Precision("fp32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny-llama-2", tmp_path_factory.mktemp("tiny"))


def test_our_scorer_is_the_eager_model_where_nothing_is_rounded(tiny: Path) -> None:
    recipe = Recipe("fp32", FP32, FP32, FP32)
    score = calibration_ours.scorer(plain_numbers(Checkpoint.open(tiny)), recipe)
    # The same float32 operations; only sums over keys are blocked otherwise.
    np.testing.assert_allclose(score(IDS), eager(tiny)(IDS), rtol=0, atol=2e-6)


def test_plain_scales_lose_more_than_error_minimising_ones(tiny: Path) -> None:
    checkpoint, int4 = Checkpoint.open(tiny), Precision("int4", 16)
    recipe = Recipe("int4", int4, FP32, FP32)
    found = {}
    for absmax in (False, True):
        case = calibration_ours.Case(recipe, absmax)
        score = calibration_ours.scorer(calibration_ours.numbers_of(checkpoint, case, None), recipe)
        found[absmax] = compare(eager(tiny), score, [IDS])["mean KL"]
    assert 0 < found[False] < found[True]


def test_bits_of_layers_count_scales(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    asymmetric = Precision("int4", 16, symmetric=False)
    assert calibration_ours.layer_bits(checkpoint, Recipe("", Precision("int4", 16), FP32, FP32)) == 5
    assert calibration_ours.layer_bits(checkpoint, Recipe("", asymmetric, FP32, FP32)) == 5.25


def test_an_exact_gguf_file_gives_back_the_model(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "exact.gguf"
    gguf_checkpoint.write(tiny, path, exact=True)
    score = quality.gguf_weights(tiny, path, whole=True)
    np.testing.assert_array_equal(score(IDS), eager(tiny)(IDS))
    assert calibration_llama.bits(path) == {"layers": 32.0, "table": 32.0, "types": "F32"}


def test_calibration_text_has_no_held_out_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_of(EXAMPLE)
    library = tmp_path / "library"
    for name in ("csv.py", "json/decoder.py", "other.py", "json/other.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name}\n")
    monkeypatch.setattr(corpus, "library_root", lambda: library)
    monkeypatch.setattr(calibration_text, "corpus_of", lambda _: corpus)
    lines = calibration_text.write_text(EXAMPLE, tmp_path / "text.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["text"] for line in lines) == ["# json/other.py\n", "# other.py\n"]


def test_differences_of_scales_are_relative() -> None:
    ours = iter([("weights", "a", 2.0 / E4M3_TOP), ("inputs", "b", 1.01 * 3 / E4M3_TOP)])
    found = differences(ours, {"a": [2.0], "b": [3.0]})
    assert found["weights"] == [0.0]
    assert found["inputs"] == pytest.approx([0.01])
