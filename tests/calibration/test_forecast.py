"""The forecast of memory: monotonous, within the limits that the documentation states, refused with exit 6."""

import pytest

from calibration.forecast import activation_bytes, forecast_bytes, store_budget, working_bytes
from exporter.core.config import ModelConfig, parse_config
from exporter.core.errors import BudgetError
from exporter.core.recipe import Precision, Recipe

INT4 = Precision("int4", 32)
GPTQ = Recipe("gptq", INT4, INT4, INT4, algorithms=("gptq",))
FP8 = Recipe("fp8", Precision("fp8", 0, activations="fp8/tensor"), Precision("bf16"), Precision("bf16"))
TOKENS = 128 * 512


def shape(hidden: int, wide: int, vocabulary: int, heads: int) -> ModelConfig:
    return parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": wide,
            "num_hidden_layers": 16,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
        }
    )


SMALL, LARGE = shape(2048, 8192, 128256, 32), shape(4096, 14336, 128256, 32)


def test_the_stated_limits_hold() -> None:
    assert forecast_bytes(SMALL, GPTQ, TOKENS) < 3e9
    assert forecast_bytes(LARGE, GPTQ, TOKENS) < 6e9


def test_less_work_takes_less_memory() -> None:
    assert working_bytes(SMALL, FP8) < working_bytes(SMALL, GPTQ) < working_bytes(LARGE, GPTQ)
    assert forecast_bytes(SMALL, GPTQ, 1024) < forecast_bytes(SMALL, GPTQ, TOKENS)
    assert forecast_bytes(SMALL, GPTQ, TOKENS) == forecast_bytes(SMALL, GPTQ, 10 * TOKENS)  # the rest is on disk


def test_activations_are_two_streams_and_with_gptq_the_widest_input() -> None:
    assert activation_bytes(SMALL, FP8, TOKENS) == 4 * TOKENS * 2 * 2048
    assert activation_bytes(SMALL, GPTQ, TOKENS) == 4 * TOKENS * (2 * 2048 + 8192)


def test_a_limit_leaves_the_rest_to_activations_or_is_refused() -> None:
    needed = working_bytes(SMALL, GPTQ)
    assert store_budget(SMALL, GPTQ, 512, needed + 1000) == 1000
    with pytest.raises(BudgetError) as refusal:
        store_budget(SMALL, GPTQ, 512, needed - 1)
    assert refusal.value.exit_code == 6 and refusal.value.kind == "memory.calibrate"
