"""The GPU benchmarks as far as a CPU takes them: tiny shapes, the engine's graph in the engine's place."""

import json
import sys

import numpy as np
import pytest

from exporter.core.config import parse_config
from tests.benchmarks import gpu_decode, gpu_moderation
from tests.benchmarks.shapes import SHAPES


def run(monkeypatch, capsys, module, *words: object) -> dict:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, words)])
    module.main()
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("recipe", ["fp8", "fp16"])
def test_moderation(monkeypatch, capsys, tmp_path, recipe):
    words = ("--shape", "tiny-llama-2", "--recipe", recipe, "--stand-in", "--calls", 2, "--batch", "1,3")
    report = run(monkeypatch, capsys, gpu_moderation, "--work", tmp_path, *words, "--prompt-tokens", 20)
    assert [row["batch"] for row in report["rows"]] == [1, 3]
    assert all(0 < row["median_seconds"] <= row["p99_seconds"] for row in report["rows"])
    assert report["facts"]["built_by"] == "not built" and report["facts"]["layers"] == 3
    assert set(report["facts"]["seconds"]) == {"checkpoint", "lower"}


def test_decoding_beside_torch(monkeypatch, capsys, tmp_path):
    words = ("--shape", "tiny-llama-3", "--recipe", "fp16", "--stand-in", "--context", 12, "--new-tokens", 3)
    report = run(monkeypatch, capsys, gpu_decode, "--work", tmp_path, *words, "--without", "torch-compile")
    assert report["tokens_per_second"].keys() == {"enginesmith", "torch-eager"}
    assert report["ratios"]["torch-eager"] > 0


def test_fewer_layers(monkeypatch, capsys, tmp_path):
    words = ("--shape", "tiny-llama-2", "--recipe", "fp16", "--stand-in", "--calls", 1, "--batch", "1", "--layers", 1)
    report = run(monkeypatch, capsys, gpu_moderation, "--work", tmp_path, *words, "--prompt-tokens", 9)
    assert report["facts"]["layers"] == 1


def test_the_floors_are_those_of_the_brief():
    """7B in FP8: 6.5 GB once through 4.8 TB/s, and 300 tokens times two operations a weight."""
    config = parse_config(SHAPES["llama-2-7b"])
    floors = gpu_moderation.floor_seconds(config, 6_476_005_376, 1, 300)
    assert floors["memory"] == pytest.approx(1.35e-3, rel=0.01)
    assert floors["arithmetic"] == pytest.approx(1.96e-3, rel=0.01)
    eight = gpu_moderation.floor_seconds(config, 6_476_005_376, 8, 300)
    assert eight["arithmetic"] == pytest.approx(8 * floors["arithmetic"])


def test_ratios_and_medians():
    assert gpu_decode.ratios({"enginesmith": 300.0, "torch-eager": 50.0}) == {"torch-eager": 6.0}
    positions = []

    def step(token: int, position: int) -> int:
        positions.append(position)
        return token + 1

    assert gpu_decode.steps_per_second(step, 100, 5) > 0
    np.testing.assert_array_equal(positions, np.arange(100, 113))


@pytest.mark.parametrize("module", [gpu_moderation, gpu_decode])
def test_defaults_are_the_cases_of_the_goal(module):
    asked = module.arguments().parse_args(["--work", "x"])
    assert asked.recipe == "fp8" and not asked.stand_in and asked.layers is None
    if module is gpu_moderation:
        assert (asked.shape, asked.batch, asked.prompt_tokens) == ("llama-2-7b", (1, 8), 300)
    else:
        assert asked.shape == "llama-3.1-8b"
