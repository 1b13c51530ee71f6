"""How matrices are cut, against torch's own splitting; and which cuts are refused."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from exporter.core.config import ModelConfig, parse_config
from exporter.core.engine_options import EngineOptions
from exporter.core.recipe import Override, Precision
from targets.tensorrt_llm.shards import MOST_RANKS, Shards, check
from targets.tensorrt_llm.trtllm_config import MODULES
from tests.targets.tensorrt_llm.trtllm_sources import SHAPE, recipe_of


def config_of(**changes: Any) -> ModelConfig:
    return parse_config({"architectures": ["LlamaForCausalLM"], **SHAPE, **changes})


@pytest.mark.parametrize("layers,pp", [(3, 1), (3, 2), (7, 3), (8, 4), (5, 5)])
def test_stages_are_those_of_torch_tensor_split(layers: int, pp: int) -> None:
    """tensorrt_llm/mapping.py, Mapping.pp_layers."""
    shards = Shards(config_of(num_hidden_layers=layers), 2, pp)
    wanted = [part.tolist() for part in torch.tensor_split(torch.arange(layers), pp)]
    assert [list(stage) for stage in shards.stages] == wanted
    assert [shards.place(layer) for stage in shards.stages for layer in stage] == [
        (number, position) for number, part in enumerate(wanted) for position in range(len(part))
    ]


def cut_like_tensorrt_llm(whole: dict[str, np.ndarray], config: ModelConfig, module: str, tp: int) -> list[np.ndarray]:
    """tensorrt_llm/models/convert_utils.py (dup_kv_weight, split) and llama/convert.py, in numpy."""
    parts = [whole[name] for name in MODULES[module]]
    if module in ("attention.dense", "mlp.proj"):
        return np.split(parts[0], tp, axis=1)
    if module == "attention.qkv" and config.num_kv_heads < tp:
        copies, heads = tp // config.num_kv_heads, config.num_kv_heads
        repeated = [part.reshape(heads, 1, config.head_dim, -1).repeat(copies, axis=1) for part in parts[1:]]
        parts = [parts[0], *(part.reshape(heads * copies * config.head_dim, -1) for part in repeated)]
    cut = [np.split(part, tp) for part in parts]
    return [np.concatenate([part[shard] for part in cut]) for shard in range(tp)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_pieces_make_the_shards_of_tensorrt_llm(kv_heads: int, tp: int) -> None:
    config = config_of(num_key_value_heads=kv_heads, head_dim=16, num_hidden_layers=2)
    shards = Shards(config, tp, 2)
    whole = {
        name: np.arange(math.prod(shape)).reshape(shape) + 1000 * number
        for number, (name, shape) in enumerate(config.linear_shapes.items())
    }
    for module, names in MODULES.items():
        wanted = cut_like_tensorrt_llm(whole, config, module, tp)
        found = {rank: np.full(shards.module_shape(module), -1) for rank in shards.ranks_of(1)}
        for name in names:
            for piece in shards.pieces(1, name):
                block = whole[name][piece.start : piece.stop, piece.left : piece.right]
                found[piece.rank][piece.row : piece.row + len(block)] = block
        for shard, rank in enumerate(shards.ranks_of(1)):
            np.testing.assert_array_equal(found[rank], wanted[shard], err_msg=f"{module} {shard}")


@pytest.mark.parametrize("vocabulary,tp", [(333, 4), (333, 1), (5, 4), (320, 8)])
def test_tables_cover_the_vocabulary_once(vocabulary: int, tp: int) -> None:
    shards = Shards(config_of(vocab_size=vocabulary, num_attention_heads=8), tp, 1)
    pieces = list(shards.table_pieces(0))
    assert shards.vocabulary == math.ceil(vocabulary / tp)
    rows = [row for piece in pieces for row in range(piece.start, piece.stop)]
    assert rows == list(range(vocabulary))
    assert all(piece.stop - piece.start <= shards.vocabulary for piece in pieces)


GIVEN: list[tuple[str, dict[str, Any], dict[str, int], str, str]] = [
    ("bf16", {}, {"tensor_parallel": 3}, "--tp 3 does not divide 8 heads", "--tp 1, 2, 4, 8"),
    ("bf16", {}, {"pipeline_parallel": 4}, "--pp 4 of a model with 3 layers", "--pp 3 at most"),
    ("bf16", {}, {"tensor_parallel": 8, "pipeline_parallel": 100}, "800 shards", f"at most {MOST_RANKS}"),
    (
        "bf16",
        {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 384},
        {"tensor_parallel": 6},
        "--tp 6 neither divides 4 heads of keys nor is a multiple",
        "--tp 1, 2, 4",
    ),
    (
        "FP8",
        {"intermediate_size": 510},
        {"tensor_parallel": 4},
        "--tp 4 does not divide the intermediate size 510",
        "--tp 1, 2",
    ),
    (
        "W4A16_AWQ",
        {},
        {"tensor_parallel": 4},
        "attention.qkv: width 256 no multiple of 512 (W4A16_AWQ: 128 for each of 4 shards); "
        "attention.dense: rows 256 and width 256 no multiple of 512 (W4A16_AWQ: 128 for each of 4 shards)",
        "--tp 1, 2",
    ),
    ("W4A8_AWQ", {"intermediate_size": 192}, {}, "mlp.fc: rows 192 no multiple of 128", "such as fp8"),
    (
        "W8A16",
        {},
        {"tensor_parallel": 8},
        "attention.qkv: rows 768 and width 256 no multiple of 512 (W8A16: 64 for",
        "--tp 1, 2",
    ),
    (
        "W4A16_AWQ",
        {"num_key_value_heads": 2},
        {"tensor_parallel": 2},
        "attention.qkv: rows 384 no multiple of 256",
        "--tp 1",
    ),
]


@pytest.mark.parametrize("name,shape,cut,why,remedy", GIVEN)
def test_cuts_that_are_refused(name: str, shape: dict[str, Any], cut: dict[str, int], why: str, remedy: str) -> None:
    found = check(config_of(**shape), recipe_of(name), EngineOptions(**cut))
    assert found.level == "refused"
    assert why in found.why
    assert remedy in found.remedy


@pytest.mark.parametrize(
    "name,cut",
    [
        ("bf16", {"tensor_parallel": 8, "pipeline_parallel": 3}),
        ("FP8", {"tensor_parallel": 8, "pipeline_parallel": 2}),
        ("W4A16_AWQ", {"tensor_parallel": 2}),
        ("W4A16_AWQ/64", {"tensor_parallel": 4}),
        ("W8A16", {"tensor_parallel": 4}),
        ("W8A8_SQ_PER_CHANNEL", {"tensor_parallel": 8}),
    ],
)
def test_cuts_that_are_possible(name: str, cut: dict[str, int]) -> None:
    assert check(config_of(), recipe_of(name), EngineOptions(**cut)).level == "native"


def test_matrices_cannot_be_left_out_where_layers_are_replaced_whole_or_counted_anew() -> None:
    left = (Override("layers.0.mlp.down_proj", Precision("bf16")),)
    for name in ("FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"):
        assert "whole layers" in check(config_of(), recipe_of(name, overrides=left), EngineOptions()).why
    fp8 = recipe_of("FP8", overrides=left)
    assert check(config_of(), fp8, EngineOptions(tensor_parallel=2)).usable
    assert "every stage" in check(config_of(), fp8, EngineOptions(pipeline_parallel=3)).why


def test_codes_of_gptq_are_not_lost_silently() -> None:
    recipe = replace(recipe_of("W4A16"), algorithms=("gptq",))
    found = check(config_of(), recipe, EngineOptions())
    assert "codes of GPTQ would be lost" in found.why and "--group-size 128" in found.remedy
    assert check(config_of(), replace(recipe_of("W4A16_AWQ"), algorithms=("gptq",)), EngineOptions()).usable


def test_int4_that_depends_on_the_cut_is_refused() -> None:
    assert check(config_of(), recipe_of("W4A16"), EngineOptions()).usable
    found = check(config_of(), recipe_of("W4A16"), EngineOptions(tensor_parallel=2))
    assert "depends on --tp" in found.why and "W4A16_AWQ" in found.remedy


def test_published_shapes_can_be_cut() -> None:
    """Llama-3-8B and 70B in groups of 128, as `--tp 2` and `--tp 8` users ask."""
    small = config_of(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    )
    large = config_of(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, head_dim=128
    )
    for config, tp in ((small, 2), (small, 4), (large, 8)):
        assert check(config, recipe_of("W4A16_AWQ"), EngineOptions(tensor_parallel=tp)).usable
