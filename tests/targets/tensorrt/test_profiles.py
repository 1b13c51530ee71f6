"""Optimization profiles from limits and options."""

import pytest

from exporter.core.engine_options import PLAIN, EngineOptions
from exporter.core.errors import InputError
from exporter.core.task import GENERATE, Task
from targets.base import Limits
from targets.tensorrt.profiles import Profile, profiles, shapes

CLASSIFY = Task("classify", ("safe", "unsafe"), (3, 4))


def test_generating_has_steps_of_one_token_and_prompts() -> None:
    assert profiles(Limits(8, 4096), PLAIN, GENERATE) == (
        Profile("decode", (1, 1, 8), (1, 1, 1)),
        Profile("prefill", (1, 1, 8), (1, 256, 2048)),
    )
    assert profiles(Limits(4, 64), PLAIN, GENERATE)[1] == Profile("prefill", (1, 1, 4), (1, 64, 64))


def test_options_move_what_kernels_are_chosen_for() -> None:
    options = EngineOptions(opt_batch=4, opt_prompt=100, max_prompt=512)
    decode, prefill = profiles(Limits(8, 4096), options, GENERATE)
    assert decode == Profile("decode", (1, 4, 8), (1, 1, 1))
    assert prefill == Profile("prefill", (1, 4, 8), (1, 100, 512))


def test_classifying_takes_a_whole_row_in_one_step() -> None:
    assert profiles(Limits(8, 4096), PLAIN, CLASSIFY) == (Profile("prefill", (1, 1, 8), (1, 256, 4096)),)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (EngineOptions(opt_batch=9), "--opt-batch is 9, --max-batch is 8"),
        (EngineOptions(opt_prompt=513, max_prompt=512), "--opt-prompt is 513, --max-prompt is 512"),
        (EngineOptions(max_prompt=5000), "--max-prompt is 5000, --max-seq-len is 4096"),
    ],
)
def test_options_beyond_the_limits_are_refused(options: EngineOptions, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        profiles(Limits(8, 4096), options, GENERATE)
    assert refused.value.kind == "tensorrt.profile" and "give 1 to" in refused.value.remedy


def test_shapes_of_inputs() -> None:
    profile = Profile("prefill", (1, 2, 8), (1, 100, 512))
    assert shapes(profile, ("B", "S")) == [(1, 1), (2, 100), (8, 512)]
    assert shapes(profile, ("B", 4, 264, 64)) == [(1, 4, 264, 64), (2, 4, 264, 64), (8, 4, 264, 64)]
