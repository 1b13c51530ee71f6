"""onnxruntime-genai loads our directory as it is, and its greedy ids are ours; in float32 also eager's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.core.config import parse_config
from exporter.core.recipe import CHANNEL, Precision, Recipe
from targets.base import Limits
from targets.onnxruntime.genai_config import genai_config
from tests.support.tiny import BASE, SHAPES
from tests.targets.engines import LIMITS, RECIPES, Engine, build, build_source, eager, eager_logits, random_ids

og = pytest.importorskip("onnxruntime_genai")
NEW_TOKENS = 24


def with_tokenizer(engine: Engine, out: Path) -> Path:
    """The engine's files beside the tokenizer's, as an artifact has them."""
    for name in engine.result.files:
        shutil.copy(engine.path / name, out / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(engine.source.checkpoint.path / name, out / name)
    return out


def genai_greedy(directory: Path, prompts: np.ndarray, max_length: int) -> list[list[int]]:
    """New tokens of each row, step by step, cut behind the first eos."""
    model = og.Model(str(directory))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(batch_size=len(prompts), max_length=max_length)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompts.astype(np.int32))
    steps = []
    while not generator.is_done():
        generator.generate_next_token()
        steps.append(generator.get_next_tokens().copy())
    eos = json.loads((directory / "genai_config.json").read_text())["model"]["eos_token_id"]
    rows = np.stack(steps, axis=1).tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in eos), len(row))] for row in rows]


def our_greedy(engine: Engine, prompt: np.ndarray, new_tokens: int) -> list[int]:
    output: list[int] = []
    with engine.runner() as runner:
        logits = runner.prefill(prompt[None], np.array([len(prompt)]))
        while True:
            output.append(int(logits[0].argmax()))
            if output[-1] in engine.config.eos_token_ids or len(output) == new_tokens:
                return output
            logits = runner.decode(np.array(output[-1:]), np.array([True]))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", ["gqa", "tied", "biases", "eos_list"])
def test_greedy_ids_are_ours(engine, tmp_path, shape, recipe):
    built = engine(shape, recipe)
    prompt = random_ids(built.config, 9, seed=4)
    [theirs] = genai_greedy(with_tokenizer(built, tmp_path), prompt[None], 9 + NEW_TOKENS)
    assert theirs == our_greedy(built, prompt, NEW_TOKENS)


CODED = [Precision("nf4", 64), Precision("nvfp4", 16), Precision("fp8", CHANNEL, activations="fp8/token")]


@pytest.mark.parametrize("kv_cache", ["fp32", "int8"])
@pytest.mark.parametrize("precision", CODED, ids=Precision.describe)
def test_coded_weights_and_caches_run_too(tiny_checkpoint, tmp_path, precision, kv_cache):
    """onnxruntime-genai allocates the cache in the type of the engine's inputs."""
    recipe = Recipe("coded", precision, precision, precision, kv_cache=kv_cache)
    source = build_source(tiny_checkpoint("gqa"), recipe, kv_scales=dict.fromkeys(range(2), (0.04, 0.03)))
    built = build(source, tmp_path / "engine")
    prompt = random_ids(built.config, 9, seed=4)
    [theirs] = genai_greedy(with_tokenizer(built, tmp_path), prompt[None], 9 + NEW_TOKENS)
    assert theirs == our_greedy(built, prompt, NEW_TOKENS)


@pytest.mark.parametrize("shape", SHAPES)
def test_float_ids_are_those_of_eager_generate(engine, tmp_path, shape):
    built = engine(shape, "fp32")
    prompt = random_ids(built.config, 7, seed=5)
    [theirs] = genai_greedy(with_tokenizer(built, tmp_path), prompt[None], 7 + NEW_TOKENS)
    generated = eager(built.source).generate(
        torch.from_numpy(prompt[None]), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
    )
    assert theirs == generated[0, 7:].tolist() == our_greedy(built, prompt, NEW_TOKENS)


@pytest.mark.parametrize("head_dim", [20, 48])
def test_other_heads_run_too(engine, tmp_path, head_dim):
    built = engine("gqa", "fp32", head_dim=head_dim)
    prompt = random_ids(built.config, 5, seed=6)
    [theirs] = genai_greedy(with_tokenizer(built, tmp_path), prompt[None], 5 + NEW_TOKENS)
    assert theirs == our_greedy(built, prompt, NEW_TOKENS)


@pytest.mark.parametrize("head_dim", [16, 20])
def test_prompts_may_come_in_pieces(engine, tmp_path, head_dim):
    built = engine("biases", "fp32", head_dim=head_dim)
    prompt = random_ids(built.config, 9, seed=9)
    model = og.Model(str(with_tokenizer(built, tmp_path)))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=LIMITS.max_seq_len)
    generator = og.Generator(model, parameters)
    for piece in (prompt[:5], prompt[5:]):
        generator.append_tokens(piece[None].astype(np.int32))
    theirs = []
    for _ in range(6):
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    assert theirs == our_greedy(built, prompt, 6)


def test_beam_search_runs(engine, tmp_path):
    """Its cache grows from step to step, past and present apart. The best of two beams scores no worse than greedy."""
    built = engine("biases", "fp32")
    prompt, new = random_ids(built.config, 9, seed=9), 6
    model = og.Model(str(with_tokenizer(built, tmp_path)))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=9 + new, num_beams=2, length_penalty=0.0, early_stopping=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt[None].astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [generator.get_sequence(0)[9:].tolist(), our_greedy(built, prompt, new)]
    scores = []
    for output in found:
        ids = np.append(prompt, output)
        logits = torch.from_numpy(eager_logits(eager(built.source), ids[:-1])[8:])
        scores.append(torch.log_softmax(logits, -1)[torch.arange(len(output)), torch.tensor(output)].sum())
    assert scores[0] >= scores[1] - 1e-4


def test_a_ragged_batch_runs(engine, tmp_path):
    """onnxruntime-genai pads with pad_token_id on the right and masks it."""
    built = engine("gqa", "int4", pad_token_id=2)
    prompts = random_ids(built.config, 2, 8, seed=7) % 300 + 10
    prompts[1, 5:] = 2
    theirs = genai_greedy(with_tokenizer(built, tmp_path), prompts, 8 + 4)
    assert theirs[0] == our_greedy(built, prompts[0], 4)
    assert theirs[1] == our_greedy(built, prompts[1, :5], 4)


def test_checkpoints_without_special_tokens_load(engine, tmp_path):
    built = engine("gqa", "fp32", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    prompt = random_ids(built.config, 4, seed=8)
    [theirs] = genai_greedy(with_tokenizer(built, tmp_path), prompt[None], 4 + NEW_TOKENS)
    assert theirs == our_greedy(built, prompt, NEW_TOKENS)


def test_the_configuration_states_the_limits():
    config = parse_config({**BASE, **SHAPES["eos_list"], "model_type": "llama"})
    written = json.loads(genai_config(config, Limits(2, 77), "model.onnx"))
    model = written["model"]
    assert (model["type"], model["context_length"], model["vocab_size"]) == ("llama", 77, 320)
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([1, 2, 5], 0, 1)
    assert model["decoder"]["head_size"] == 16
    assert written["search"]["max_length"] == 77
    assert written["search"]["past_present_share_buffer"] is True
    assert LIMITS.max_seq_len >= 9 + NEW_TOKENS
