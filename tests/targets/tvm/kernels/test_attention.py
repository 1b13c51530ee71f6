import os
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest

from exporter.core.errors import UnsupportedError
from tests.targets.tvm.kernels.caches import Cache
from tests.targets.tvm.kernels.calls import all_profiles, outside_calls
from tests.targets.tvm.kernels.native import NATIVE, aligned, compiled, every_profile

pytest.importorskip("tvm")
import tvm_ffi

from targets.tvm.isa import Isa
from targets.tvm.kernels.attention import attention
from targets.tvm.kernels.attention_plan import parts
from targets.tvm.kernels.vector import LOG2_E

# float32 sums of up to 128 terms for scores of about 5, then of several hundred for values; measured up to 4e-6.
TOLERANCE = 2e-5

RAGGED_DECODE = [(2, 0, 1, 300), (0, 1, 1, 0), (3, 2, 1, 127), (1, 3, 1, 128)]
RAGGED_PREFILL = [(1, 0, 70, 0), (3, 70, 1, 255), (0, 71, 33, 201), (2, 104, 130, 31)]
Segments = list[tuple[int, int, int, int]]


def reference(q: np.ndarray, segments: Segments, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Attention in float64; q [T, heads, D], keys and values [B, Hkv, S, D]."""
    y = np.zeros(q.shape)
    group = q.shape[1] // keys.shape[1]
    for row, first, count, past in segments:
        for i in range(count):
            seen_keys, seen_values = (
                np.repeat(array[row, :, : past + i + 1], group, axis=0) for array in (keys, values)
            )
            scores = np.einsum("hd,hsd->hs", q[first + i].astype(np.float64), seen_keys)
            weights = np.exp2(scores - scores.max(-1, keepdims=True))
            y[first + i] = np.einsum("hs,hsd->hd", weights / weights.sum(-1, keepdims=True), seen_values)
    return y


def spoiled(cache: Cache, segments: Segments) -> None:
    """Everything that no token may see becomes NaN, or the largest code with a scale of NaN."""
    lengths = dict.fromkeys(range(len(cache.arrays[1])), 0)
    lengths.update({row: past + count for row, _, count, past in segments})
    key, value, *scales = cache.arrays
    bad = 127 if cache.kind == "int8" else np.nan
    by_position = key.swapaxes(3, 4).reshape(*value.shape[:3], cache.head_dim).copy()
    for row, length in lengths.items():
        for array in (by_position, value):
            array[row, :, length:] = bad
        for scale in scales:
            scale[row, :, length:] = np.nan
    key[...] = by_position.reshape(*key.shape[:3], key.shape[4], key.shape[3]).swapaxes(3, 4)


@cache
def kernel_of(isa: Isa, heads: int, kv_heads: int, head_dim: int, kind: str) -> Callable[..., None]:
    return compiled(attention(isa, "attention", heads, kv_heads, head_dim, kind), isa)


def check(isa: Isa, kind: str, head_dim: int, heads: int, kv_heads: int, segments: Segments) -> None:
    random = np.random.default_rng(heads * head_dim)
    tokens = max(first + count for _, first, count, _ in segments)
    positions = max(count + past for *_, count, past in segments)
    shape = (4, kv_heads, positions, head_dim)
    keys, values = (random.normal(0, 1, shape).astype(np.float32) for _ in range(2))
    # Scores of a deviation of 3 bits or so: weights are neither equal nor all on one position.
    q = aligned((random.normal(0, 2 * LOG2_E / np.sqrt(head_dim), (tokens, heads, head_dim))).astype(np.float32))
    cache = Cache.of(isa, kind, keys, values)
    decoded = cache.decoded()
    expected = reference(q, segments, *decoded)
    spoiled(cache, segments)
    y = aligned(np.full((tokens, heads * head_dim), np.nan, np.float32))
    run = kernel_of(isa, heads, kv_heads, head_dim, kind)
    run(q.reshape(tokens, -1), aligned(np.array(segments, np.int32)), *cache.arrays, y)
    error = np.abs(y.reshape(expected.shape) - expected)
    np.testing.assert_array_less(error, TOLERANCE)
    assert np.linalg.norm(error) <= TOLERANCE * np.linalg.norm(expected)


def error_of_prefill(isa: Isa, kind: str, deviation: float) -> float:
    """Relative error of y for scores of this deviation, whose keys share a large component, as trained models' do."""
    random = np.random.default_rng(5)
    tokens, past, head_dim = 96, 416, 64
    keys, values = (random.normal(0, 1, (1, 1, tokens + past, head_dim)).astype(np.float32) for _ in range(2))
    q = random.normal(0, deviation * LOG2_E / np.sqrt(head_dim), (tokens, 2, head_dim)).astype(np.float32)
    q[..., 3] *= 5
    keys[..., 3] += 5
    cache, segments = Cache.of(isa, kind, keys, values), [(0, 0, tokens, past)]
    expected = reference(q, segments, *cache.decoded())
    y = aligned(np.zeros((tokens, 2 * head_dim), np.float32))
    kernel_of(isa, 2, 1, head_dim, kind)(
        aligned(q.reshape(tokens, -1)), aligned(np.array(segments, np.int32)), *cache.arrays, y
    )
    return float(np.linalg.norm(y.reshape(expected.shape) - expected) / np.linalg.norm(expected))


@every_profile
@pytest.mark.parametrize("kind", ["fp16", "int8"])
@pytest.mark.parametrize("deviation", [1, 4, 10])
def test_prefill_is_accurate_for_peaked_scores_too(isa: Isa, kind: str, deviation: int) -> None:
    """bfloat16 would cost 1.5e-2 for keys like these, or 2e-3 in weights and values alone; engines are held to 1e-2."""
    assert error_of_prefill(isa, kind, deviation) < TOLERANCE


@every_profile
@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_one_position_with_nearly_all_of_the_weight_hides_no_other(isa: Isa, kind: str) -> None:
    """As trained models have it at the first position, whose value they leave near zero."""
    random = np.random.default_rng(7)
    tokens, past, head_dim = 8, 1016, 32
    keys, values = (random.normal(0, 1, (1, 1, tokens + past, head_dim)).astype(np.float32) for _ in range(2))
    keys[..., 0], keys[:, :, 0, 0], values[:, :, 0] = 0, 16, 0
    q = random.normal(0, 0.2, (tokens, 1, head_dim)).astype(np.float32)
    q[..., 0] = 1
    cache, segments = Cache.of(isa, kind, keys, values), [(0, 0, tokens, past)]
    expected = reference(q, segments, *cache.decoded())
    y = aligned(np.zeros((tokens, head_dim), np.float32))
    run = kernel_of(isa, 1, 1, head_dim, kind)
    run(aligned(q.reshape(tokens, -1)), aligned(np.array(segments, np.int32)), *cache.arrays, y)
    error = np.linalg.norm(y.reshape(expected.shape) - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE


@every_profile
@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_rows_of_zeros_are_means(isa: Isa, kind: str) -> None:
    """Queries and keys that have no norm: all weights are equal."""
    tokens, head_dim = 40, 16
    values = np.random.default_rng(6).normal(0, 1, (1, 1, tokens, head_dim)).astype(np.float32)
    for q_of, key_of in ((0.0, 1.0), (1.0, 0.0)):
        keys = np.full(values.shape, key_of, np.float32)
        q = aligned(np.full((tokens, 2 * head_dim), q_of, np.float32))
        cache = Cache.of(isa, kind, keys, values)
        y = aligned(np.zeros_like(q))
        kernel_of(isa, 2, 1, head_dim, kind)(q, aligned(np.array([(0, 0, tokens, 0)], np.int32)), *cache.arrays, y)
        seen = cache.decoded()[1][0, 0, :tokens]
        means = np.cumsum(seen, axis=0) / np.arange(1, tokens + 1)[:, None]
        np.testing.assert_allclose(y, np.hstack([means, means]), rtol=0, atol=TOLERANCE)


SEGMENTS = pytest.mark.parametrize("segments", [RAGGED_DECODE, RAGGED_PREFILL], ids=["decode", "prefill"])


@every_profile
@SEGMENTS
@pytest.mark.parametrize(
    "kind, head_dim, heads, kv_heads",
    [("fp32", 64, 4, 1), ("fp16", 80, 8, 1), ("int8", 24, 6, 2)],
)
def test_every_token_sees_its_own_past(
    isa: Isa, kind: str, head_dim: int, heads: int, kv_heads: int, segments: Segments
) -> None:
    check(isa, kind, head_dim, heads, kv_heads, segments)


@SEGMENTS
@pytest.mark.parametrize(
    "kind, head_dim, heads, kv_heads",
    [("fp16", 64, 4, 1), ("int8", 64, 4, 1), ("fp16", 16, 3, 3), ("int8", 128, 4, 2), ("fp32", 24, 13, 1)],
)
def test_other_shapes(kind: str, head_dim: int, heads: int, kv_heads: int, segments: Segments) -> None:
    check(NATIVE[0], kind, head_dim, heads, kv_heads, segments)


@pytest.fixture
def five_threads() -> Iterator[None]:
    """More threads than the machine has cores, perhaps: heads are split among several."""
    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    configure(1, 5)
    yield
    configure(1, int(os.environ["TVM_NUM_THREADS"]))


@pytest.mark.usefixtures("five_threads")
@pytest.mark.parametrize(
    "segments", [[(1, 0, 1, 900)], [(0, 0, 1, 5), (2, 1, 1, 650), (1, 2, 1, 390)], [(2, 0, 200, 3)]]
)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_threads_share_what_is_there(segments: Segments, kv_heads: int) -> None:
    """One head that three and more threads split, threads whose piece lies inside a head, more threads than tasks."""
    check(NATIVE[0], "fp16", 16, 4, kv_heads, segments)


@all_profiles
@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_nothing_is_called_outside_of_the_kernel(isa: Isa, kind: str) -> None:
    assert outside_calls(attention(isa, "attention", 6, 2, 40, kind), isa) == set()


def test_heads_that_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match="6 query heads cannot share 4"):
        attention(NATIVE[0], "attention", 6, 4, 64, "fp16")


def test_an_unknown_kind_of_cache_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'fp8' is unknown"):
        attention(NATIVE[0], "attention", 4, 4, 64, "fp8")


def test_parts_are_equal() -> None:
    assert parts(5, 4) == [(0, 2), (2, 3)]
    assert parts(8, 8) == [(0, 8)]
    assert [count for _, count in parts(13, 6)] == [4, 4, 5]
