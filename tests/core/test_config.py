"""config.json: the same model as transformers reads, and a refusal with a name for everything else."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, LlamaForCausalLM

from exporter.core.config import ModelConfig, parse_config
from exporter.core.errors import EngineSmithError, InputError, UnsupportedError
from tests.support.tiny import BASE, SHAPES

GOOD: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **BASE}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
WHOLE = (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")


@pytest.mark.parametrize("shape", SHAPES)
def test_reads_what_transformers_wrote(tiny_checkpoint: Any, shape: str) -> None:
    path = tiny_checkpoint(shape)
    config, reference = ModelConfig.from_directory(path), AutoConfig.from_pretrained(path)
    for ours, theirs in {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "max_position_embeddings": "max_position_embeddings",
        "rms_norm_eps": "rms_norm_eps",
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "tie_word_embeddings": "tie_word_embeddings",
        "bos_token_id": "bos_token_id",
        "pad_token_id": "pad_token_id",
    }.items():
        assert getattr(config, ours) == getattr(reference, theirs), ours
    eos = reference.eos_token_id
    assert config.eos_token_ids == tuple(eos if isinstance(eos, list) else [eos])
    parameters = {name: tuple(p.shape) for name, p in LlamaForCausalLM(reference).named_parameters()}
    assert config.tensor_shapes == parameters
    assert config.head_source in parameters


def test_fields_that_have_a_default() -> None:
    fields = {name: GOOD[name] for name in ("architectures", *REQUIRED)}
    config = parse_config(fields)
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (4, 16, 2048)
    assert (config.rms_norm_eps, config.rope.theta) == (1e-6, 10000.0)
    assert not (config.attention_bias or config.mlp_bias or config.tie_word_embeddings)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (), None)
    assert parse_config({**fields, "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": None}) is not None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "Qwen2ForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": None, "model_type": "gemma"}, "gemma"),
        ({"architectures": None, "model_type": None}, "None"),
        ({"architectures": "MistralForCausalLM"}, "MistralForCausalLM"),
        ({"architectures": {"a": 1}}, "a"),
        ({"model_type": "mistral"}, "mistral"),
        ({"model_type": ["llama"]}, "llama"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_act": None}, "None"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"compression_config": {"format": "pack-quantized"}}, "quantized"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "default"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "0.5"),
        ({"partial_rotary_factor": 0.25}, "0.25"),
    ],
)
def test_other_models_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        parse_config({**GOOD, **fields})
    assert caught.value.exit_code == 3
    assert named in caught.value.message
    assert caught.value.remedy


def test_architecture_may_be_told_by_model_type_alone() -> None:
    assert parse_config({**GOOD, "architectures": None}).hidden_size == GOOD["hidden_size"]
    assert parse_config({**GOOD, "hidden_act": "swish"}).hidden_size == GOOD["hidden_size"]


ABSURD = [0, -1, -(2**63), 2**63, 10**400, "64", "", 64.0, True, False, [], {}, [64], float("nan"), float("inf")]


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("name", WHOLE)
def test_absurd_whole_numbers(name: str, value: object) -> None:
    assert_refused({name: value}, name)


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_or_null_fields(name: str) -> None:
    assert_refused({name: None}, name)
    with pytest.raises(InputError, match=name):
        parse_config({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize(
    "value", [0, 0.0, -1e-6, 1e-13, 1e13, 10**400, "1e-6", True, [], float("nan"), float("inf")], ids=str
)
@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_absurd_numbers(name: str, value: object) -> None:
    assert_refused({name: value}, name)


@pytest.mark.parametrize("value", [0, 1, "true", None, [], 1.0])
@pytest.mark.parametrize("name", ["attention_bias", "mlp_bias", "tie_word_embeddings"])
def test_absurd_booleans(name: str, value: object) -> None:
    assert_refused({name: value}, name)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"num_attention_heads": 128, "num_key_value_heads": 128}, "head_dim"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_size": 60}, "head_dim"),
        ({"eos_token_id": "</s>"}, "token id"),
        ({"eos_token_id": [1, None]}, "token id"),
        ({"eos_token_id": [[1]]}, "token id"),
        ({"bos_token_id": 1.0}, "token id"),
        ({"pad_token_id": True}, "token id"),
        ({"rope_parameters": "llama3"}, "rope_parameters"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1}}, "high_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 0,
                }
            },
            "original_max_position_embeddings",
        ),
    ],
)
def test_fields_that_contradict(fields: dict[str, Any], named: str) -> None:
    assert_refused(fields, named)


@pytest.mark.parametrize(
    ("value", "ids"),
    [(2, (2,)), ([2, 5], (2, 5)), ([], ()), (None, ()), (-1, ()), (320, ()), ([7, 10**30], (7,))],
)
def test_token_ids_outside_the_vocabulary_mean_none(value: object, ids: tuple[int, ...]) -> None:
    assert parse_config({**GOOD, "eos_token_id": value}).eos_token_ids == ids


def test_generation_config_overrides_the_stop_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 9]}))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (3, 9)


BAD_FILES = {
    "empty": b"",
    "list": b"[]",
    "not UTF-8": b'{"a": "\xff"}',
    "cut": b'{"architectures": ["Llama',
    "NaN": b'{"rms_norm_eps": NaN}',
    "key twice": b'{"hidden_size": 64, "hidden_size": 128}',
    "nested too deeply": b'{"a": ' + b"[" * 200_000,
    "digits without end": b'{"hidden_size": ' + b"9" * 100_000 + b"}",
    "too large": b" " * (5 << 20),
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_files_that_are_not_a_configuration(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        ModelConfig.from_directory(tmp_path)
    assert caught.value.kind == "checkpoint.config"
    assert name in caught.value.message


def test_directory_missing_a_file_or_without_config(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    for path, kind in ((tmp_path / "absent", "missing"), (file, "missing"), (tmp_path, "config")):
        with pytest.raises(InputError) as caught:
            ModelConfig.from_directory(path)
        assert (caught.value.kind, caught.value.exit_code) == (f"checkpoint.{kind}", 2)
        assert str(path) in caught.value.message
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config\.json"):
        ModelConfig.from_directory(tmp_path)


ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OTHER = [None, "llama", "default", -1, 1, 2, 64, 0.5, [1], ["LlamaForCausalLM"], {"a": 1}, "\ud800", 10**12, 1e-12]


@pytest.mark.parametrize("seed", range(4))
def test_random_fields_are_refused_or_make_a_sound_configuration(seed: int) -> None:
    """Whatever stands in the fields, the answer is a named error or a configuration that can be computed with."""
    rng = random.Random(seed)
    base = {**GOOD, "rope_parameters": ROPE, "quantization_config": None, "hidden_act": "silu", "rms_norm_eps": 1e-6}
    accepted = 0
    for _ in range(400):
        fields = copy.deepcopy(base)
        for _ in range(rng.randint(1, 3)):
            holder = fields if rng.random() < 0.7 or not isinstance(fields["rope_parameters"], dict) else None
            holder = fields["rope_parameters"] if holder is None else holder
            holder[rng.choice(sorted(holder))] = rng.choice([*ABSURD, *OTHER])
        try:
            config = parse_config(fields)
        except EngineSmithError as error:
            assert error.kind and error.message and error.remedy
            continue
        accepted += 1
        frequencies = config.rope.inverse_frequencies(config.head_dim)
        assert np.isfinite(frequencies).all() and (frequencies > 0).all()
        assert all(size > 0 for shape in config.tensor_shapes.values() for size in shape)
    assert accepted > 20


def assert_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_config({**GOOD, **fields})
    assert (caught.value.kind, caught.value.exit_code) == ("checkpoint.config", 2)
    assert named in caught.value.message
    assert len(caught.value.message) < 300
