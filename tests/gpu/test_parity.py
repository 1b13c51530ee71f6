"""The whole way on the GPU: built, run, held to eager and to its simulation, measured; a classifier too."""

from pathlib import Path

import pytest

from tests.cli.command import enginesmith

pytestmark = pytest.mark.gpu

MODEL = Path(__file__).resolve().parents[2] / "examples" / "stdlib-llama"
LIMITS = ("--max-seq-len", "512", "--max-batch", "4")


def succeed(*arguments: object) -> dict:
    done = enginesmith(*arguments, "--json", timeout=3600)
    assert done.code == 0, done.err[-3000:] or done.out[-3000:]
    return done.json


@pytest.mark.parametrize("recipe", ["fp16", "fp8", "int4-rtn"])
def test_engines_are_verified_where_they_run(build, tmp_path, recipe):
    """fp8 takes its scales of activations from calibration on the built-in sample."""
    out = tmp_path / recipe
    built = succeed("build", MODEL, "--target", "tensorrt", "--recipe", recipe, *LIMITS, *build.flags, "--out", out)
    assert built["proof"]["engine_run"] is True, built["proof"]
    verified = succeed("verify", out, "--against", MODEL)
    assert verified["passed"] and verified["proof"]["engine_run"] is True
    measured = succeed("bench", out, "--prompt-tokens", 128, "--new-tokens", 64)
    print(f"\n{recipe}: {measured}")
    assert measured["decode_tokens_per_s"] > 0


def test_a_classifier_runs(build, tmp_path):
    out = tmp_path / "classifier"
    task = ("--task", "classify", "--labels", "def,class")
    succeed("build", MODEL, "--target", "tensorrt", "--recipe", "fp16", *task, *LIMITS, *build.flags, "--out", out)
    assert succeed("verify", out, "--against", MODEL)["passed"]
    assert succeed("run", out, "--prompt", "import os\n\n")["label"] in ("def", "class")
