"""The KV cache of the simulation: against NumPy's rounding, and inside the eager model."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from exporter.core.checkpoint import Checkpoint
from exporter.parity.cache_values import RoundedCache, round_cached
from exporter.parity.metrics import relative_l2_error
from exporter.parity.reference import EagerModel
from tests.conftest import CheckpointFactory


def values(shape: tuple[int, ...] = (2, 3, 7, 20)) -> np.ndarray:
    """float32, some positions large, some tiny, one all zeros."""
    random = np.random.default_rng(1)
    x = random.standard_normal(shape) * 10.0 ** random.integers(-6, 4, (*shape[:-1], 1))
    x[0, 0, 0] = 0.0
    return x.astype(np.float32)


def test_fp16_is_numpys_float16() -> None:
    x = values()
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(round_cached(torch.from_numpy(x), "fp16").numpy(), expected)


def test_bf16_is_ml_dtypes_bfloat16() -> None:
    x = values()
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(round_cached(torch.from_numpy(x), "bf16").numpy(), expected)


def test_int8_has_a_scale_for_each_position_and_head() -> None:
    x = values()
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(x / np.where(scale > 0, scale, np.float32(1)))
    assert codes.min() >= -127 and codes.max() <= 127
    np.testing.assert_array_equal(round_cached(torch.from_numpy(x), "int8").numpy(), codes * scale)


def test_calibrated_scales_saturate() -> None:
    x, scale = values(), np.float32(0.03)
    assert np.abs(x).max() > 448 * scale
    found = {kind: round_cached(torch.from_numpy(x), kind, float(scale)).numpy() for kind in ("int8", "fp8")}
    np.testing.assert_array_equal(found["int8"], np.clip(np.rint(x / scale), -128, 127) * scale)
    codes = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(found["fp8"], codes.astype(np.float32) * scale)
    with pytest.raises(ValueError, match="without its scales"):
        round_cached(torch.from_numpy(x), "fp8")


def test_keys_and_values_have_scales_of_their_own() -> None:
    x = torch.from_numpy(values())
    keys, found = RoundedCache("fp8", (0.5, 0.25)).update(x, x, 0)
    assert torch.equal(keys, round_cached(x, "fp8", 0.5)) and torch.equal(found, round_cached(x, "fp8", 0.25))


def test_fp32_is_left_alone_and_others_are_unknown() -> None:
    x = torch.from_numpy(values())
    assert round_cached(x, "fp32") is x
    with pytest.raises(ValueError, match="int3"):
        round_cached(x, "int3")


def test_the_cache_rounds_what_it_is_given_once() -> None:
    x = torch.from_numpy(values())
    cache = RoundedCache("fp16")
    cache.update(x, x * 2, 0)
    keys, both = cache.update(x * 3, x * 4, 0)
    assert torch.equal(keys, torch.cat([round_cached(x, "fp16"), round_cached(x * 3, "fp16")], dim=-2))
    assert torch.equal(both, torch.cat([round_cached(x * 2, "fp16"), round_cached(x * 4, "fp16")], dim=-2))


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: CheckpointFactory) -> Checkpoint:
    path: Path = tiny_checkpoint("gqa", gain=0.5)
    return Checkpoint.open(path)


def outputs(checkpoint: Checkpoint, kind: str, chunk: int = 128) -> list[np.ndarray]:
    row = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, 40)
    model = EagerModel(checkpoint, kv_cache=kind, chunk=chunk)
    assert model.rounds == (kind != "fp32")
    return [states[0] for states in model.boundaries([row])]


def test_coarser_caches_part_further_from_eager(checkpoint: Checkpoint) -> None:
    exact = outputs(checkpoint, "fp32")[-1]
    half, byte = (relative_l2_error(exact, outputs(checkpoint, kind)[-1]) for kind in ("fp16", "int8"))
    # Half a unit is 2^-12 of a value, and 1 / 254 of the largest of a head, which is about three times the others.
    assert 1e-6 < half < 2**-11
    assert 8 * half < byte < 3 / 254


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8"])
def test_a_layer_in_chunks_sees_the_rounded_values_of_its_own_chunk_too(checkpoint: Checkpoint, kind: str) -> None:
    """Token by token or all at once: attention reads the cache, also for the positions of this very call."""
    whole, single = outputs(checkpoint, kind)[1], outputs(checkpoint, kind, chunk=1)[1]
    unlike = relative_l2_error(outputs(checkpoint, "fp32")[1], whole)
    assert relative_l2_error(whole, single) < unlike / 20


def test_keys_are_rounded_after_rotation(checkpoint: Checkpoint) -> None:
    hidden = np.random.default_rng(2).standard_normal((9, checkpoint.config.hidden_size)).astype(np.float32)
    exact = EagerModel(checkpoint).layer(0).run(hidden)
    found = EagerModel(checkpoint, kv_cache="int8").layer(0).run(hidden)
    for plain, rounded in ((exact.keys, found.keys), (exact.values, found.values)):
        np.testing.assert_allclose(rounded, round_cached(torch.from_numpy(plain), "int8").numpy(), atol=1e-6, rtol=1e-5)
