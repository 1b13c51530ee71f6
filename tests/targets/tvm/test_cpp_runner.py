"""The C++ example: built and run here, and for aarch64 under emulation; both give the tokens of the Python runner."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.qemu import ROOT, aarch64
from tests.targets.engines import Engine
from tests.targets.tvm.runners import open_runner

EXAMPLE = ROOT / "examples" / "tvm-cpp-runner"
SOURCES = [EXAMPLE / name for name in ("main.cpp", "engine.h", "host.h")]
PROMPT = [1, 2, 3, 250, 17]
TOKENS = 12
ENGINES = [("gqa", "fp32", "fp32"), ("tied", "int4", "fp16"), ("biases", "int8", "int8")]
engines = pytest.mark.parametrize(("shape", "recipe", "kv_cache"), ENGINES, ids="-".join)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The program built by its Makefile."""
    pytest.importorskip("tvm", reason="apache-tvm is not installed: no engine can be compiled")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or shutil.which("make") is None:
        pytest.skip("the C++ runner is not tested: no g++ or no make")
    out = tmp_path_factory.mktemp("cpp") / "tvm-runner"
    words = ["make", "-C", str(EXAMPLE), f"CXX={compiler}", f"PYTHON={sys.executable}", f"OUT={out}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return out


def run(program: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    from tvm_ffi import libinfo

    from targets.tvm.library import runtime_path

    folders = f"{runtime_path().parent}:{Path(libinfo.find_libtvm_ffi()).parent}"
    environment = {**os.environ, "LD_LIBRARY_PATH": folders}
    return subprocess.run([program, *words], capture_output=True, text=True, check=False, env=environment)


def python_tokens(engine: Engine) -> list[int]:
    """Greedy tokens of the Python runner."""
    tokens: list[int] = []
    with open_runner(engine) as runner:
        logits = runner.prefill(np.array([PROMPT]), np.array([len(PROMPT)]))
        while len(tokens) < TOKENS:
            tokens.append(int(logits[0].argmax()))
            logits = runner.decode(np.array(tokens[-1:]), np.array([True]))
    return tokens


def as_artifact(engine: Engine, folder: Path, **changes: object) -> Path:
    """The engine with as much of a manifest as the program reads."""
    shutil.copytree(engine.path, folder, dirs_exist_ok=True)
    manifest = {"triple": engine.result.triple, "requirements": engine.result.requirements} | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def prompt_words() -> list[str]:
    return ["--prompt-ids", ",".join(map(str, PROMPT)), "--max-new-tokens", str(TOKENS)]


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


@engines
def test_it_generates_the_same_tokens(tvm_engine, program, tmp_path, shape, recipe, kv_cache):
    built = tvm_engine(shape, recipe, kv_cache)
    for threads in ("1", "3"):
        done = run(program, as_artifact(built, tmp_path), *prompt_words(), "--threads", threads)
        assert done.returncode == 0, done.stderr
        assert numbers(done.stdout) == python_tokens(built)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--prompt-ids", "1,x"], 2, "bad number: x"),
        (["--prompt-ids", "1,320"], 2, "320 is not in the vocabulary"),
        (["--prompt-ids", "1", "--max-new-tokens", "40"], 2, "longer than the engine's 40 positions"),
        (["--prompt-ids", "1", "--threads", "0"], 2, "bad number: 0"),
        (["--max-new-tokens", "3"], 2, "--prompt-ids are needed"),
        (["--prompt-ids"], 2, "--prompt-ids needs a value"),
    ],
)
def test_bad_input_is_named(tvm_engine, program, tmp_path, words, code, message):
    done = run(program, as_artifact(tvm_engine(), tmp_path), *words)
    assert done.returncode == code and message in done.stderr


def test_another_machine_or_cpu_is_refused(tvm_engine, program, tmp_path):
    for changes, message in (
        ({"requirements": {"cpu_features": ["time_travel"]}}, "lacks: time_travel"),
        ({"triple": "vax-vms"}, "built for vax-vms"),
    ):
        done = run(program, as_artifact(tvm_engine(), tmp_path, **changes), *prompt_words())
        assert done.returncode == 5 and message in done.stderr
    assert run(program, tmp_path / "nothing", *prompt_words()).returncode == 2


def test_a_classifier_is_refused_and_an_older_engine_is_not(tvm_engine, program, tmp_path):
    folder = as_artifact(tvm_engine(), tmp_path)
    index = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**index, "head_size": 2}))
    done = run(program, folder, *prompt_words())
    assert done.returncode == 2 and "tells labels apart" in done.stderr
    del index["head_size"]
    (folder / "engine.json").write_text(json.dumps(index))
    assert run(program, folder, *prompt_words()).returncode == 0


# graviton3 itself asks for what qemu 7.2 has no core for.
CORES = [("aarch64", "cortex-a53"), ("raspberry-pi-5", "cortex-a76"), ("aarch64-i8mm", "max")]


@pytest.mark.parametrize(("device", "core"), CORES)
def test_engines_for_aarch64_generate_the_same_tokens(tvm_engine, tmp_path, device, core):
    emulated = aarch64()
    shape, recipe, kv_cache = "tied", "int4", "fp16"
    program = emulated.program("c++", *SOURCES)
    foreign = as_artifact(tvm_engine(shape, recipe, kv_cache, device), tmp_path)
    done = emulated.run(program, foreign, *prompt_words(), "--threads", "2", core=core)
    assert numbers(done.stdout) == python_tokens(tvm_engine(shape, recipe, kv_cache))


def test_an_emulated_cpu_without_a_feature_is_refused(tvm_engine, tmp_path):
    emulated = aarch64()
    foreign = as_artifact(tvm_engine("tied", "int4", "fp16", "raspberry-pi-5"), tmp_path)
    done = emulated.run(emulated.program("c++", *SOURCES), foreign, *prompt_words(), core="cortex-a57", check=False)
    assert done.returncode == 5 and "asimddp" in done.stderr
