"""A real engine from the directory to text: against eager generation, against onnxruntime-genai, without torch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from calibration.coverage import coverage
from exporter.artifact.load import open_artifact
from exporter.artifact.manifest import PrecisionTable, Source, write_manifest
from exporter.artifact.tokenizer_files import read_tokenizer
from exporter.runtime.bench import bench
from exporter.runtime.engine import load
from tests.artifact.sample import manifest
from tests.targets.engines import RECIPES, build, build_source

pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[2]
PROMPTS = ["def f(x):", "return the sum of them", "a"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer class that no reader knows."""
    path = Path(shutil.copytree(tiny_checkpoint("gqa"), tmp_path_factory.mktemp("source") / "gqa"))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "HomeMade"}))
    return path


@pytest.fixture(scope="module", params=["fp32", "int4"])
def directory(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = build_source(checkpoint, RECIPES[request.param])
    out = tmp_path_factory.mktemp("engine")
    result = build(source, out).result
    read_tokenizer(checkpoint, source.config).write(out)
    fields = {
        "source": Source(source.checkpoint.digest, source.config),
        "recipe": source.recipe,
        "coverage": PrecisionTable.from_json(coverage(source.config, source.recipe).to_json()),
        "requirements": result.requirements,
        "toolchain": result.toolchain,
        "signature": result.signature,
        "limits": source.limits,
        "weights_bytes": result.weights_bytes,
    }
    write_manifest(out, manifest(**fields))
    return out


def eager_greedy(checkpoint: Path, ids: tuple[int, ...], steps: int) -> list[int]:
    """The plain loop over the unmodified model, without any cache."""
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(steps):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
            if int(tokens[0, -1]) == 1:
                break
    return list(map(int, tokens[0, len(ids) :]))


def test_ragged_batch_equals_single_prompts_and_eager(directory: Path, checkpoint: Path) -> None:
    with load(directory, threads=1, batch=3) as engine:
        together = engine.generate_batch(PROMPTS, max_new_tokens=12)
        alone = [engine.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]
    assert together == alone
    if open_artifact(directory).manifest.recipe.lossless:
        for answer in together:
            assert list(answer.output_ids) == eager_greedy(checkpoint, answer.prompt_ids, 12)


def test_genai_reads_the_tokenizer_and_gives_the_same_tokens(directory: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    with load(directory, threads=1) as engine:
        answer = engine.generate(PROMPTS[1], max_new_tokens=10)
    model = genai.Model(str(directory))
    tokenizer = genai.Tokenizer(model)
    ids = [int(token) for token in tokenizer.encode(PROMPTS[1])]
    assert tuple(ids) == answer.prompt_ids
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + len(answer.output_ids), do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert tuple(map(int, generator.get_sequence(0)))[len(ids) :] == answer.output_ids


def test_generation_up_to_the_limit(directory: Path) -> None:
    with load(directory, threads=1) as engine:
        limit = engine.manifest.limits.max_seq_len
        answer = engine.generate([5] * (limit - 3), max_new_tokens=100)
        assert len(answer.output_ids) == 3 or answer.finish_reason == "stop"
        assert engine.generate([5] * limit, max_new_tokens=1).output_ids == ()


def test_the_benchmark_of_a_real_engine(directory: Path) -> None:
    found = bench(directory, prompt_tokens=8, new_tokens=4, batch=2, context=10, threads=1)
    assert all(np.isfinite(value) for value in found.values())
    assert found["weights_bytes"] == open_artifact(directory).manifest.weights_bytes


SCRIPT = """
import sys
from exporter.runtime.engine import load
with load(sys.argv[1], threads=1) as engine:
    engine.generate("def f", max_new_tokens=3)
    engine.chat([{"role": "user", "content": "Hello"}], max_new_tokens=3)
heavy = [name for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript") if name in sys.modules]
assert not heavy, heavy
"""


def test_running_a_real_engine_imports_no_torch(directory: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(directory)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
