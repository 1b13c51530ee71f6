import math
from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.targets.tvm.kernels.caches import Cache
from tests.targets.tvm.kernels.calls import all_profiles, outside_calls
from tests.targets.tvm.kernels.native import aligned, compiled, every_profile

pytest.importorskip("tvm")
from tvm.script.ir_builder import tirx as T

from targets.tvm.isa import Isa
from targets.tvm.kernels.cache_values import to_half
from targets.tvm.kernels.ir import arguments, kernel, load, size, store
from targets.tvm.kernels.rotary_cache import rotary_cache
from targets.tvm.kernels.vector import LOG2_E, Vectors

POSITIONS, ROWS = 70, 3


def turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Heads [T, H, D], each turned by its token's angles."""
    low, high = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def short(x: np.ndarray) -> np.ndarray:
    """Rounded to multiples of 1/64."""
    return (np.rint(x * 64) / 64).astype(np.float32)


@every_profile
@pytest.mark.parametrize(
    "kind, head_dim, heads, kv_heads, tokens",
    [
        *((kind, head_dim, 6, 2, 9) for kind, head_dim in product(("fp32", "fp16", "int8"), (64, 80))),
        ("fp16", 6, 2, 1, 3),
        ("int8", 24, 3, 3, 1),
        ("fp16", 128, 2, 1, 40),
        ("int8", 320, 1, 1, 5),
    ],
)
def test_queries_turn_and_keys_and_values_are_cached(
    isa: Isa, kind: str, head_dim: int, heads: int, kv_heads: int, tokens: int
) -> None:
    """Inputs of few bits: their products are exact, so that fused and separate operations agree on every bit."""
    random = np.random.default_rng(head_dim)
    qkv = short(random.normal(0, 2, (tokens, heads + 2 * kv_heads, head_dim)))
    qkv[-1, -1] = 0
    angles = random.uniform(0, 6, (POSITIONS, head_dim // 2))
    cos, sin = aligned(short(np.cos(angles))), aligned(short(np.sin(angles)))
    cells = random.permutation(POSITIONS * ROWS)[:tokens].astype(np.int32)
    positions, rows = aligned(cells % POSITIONS), aligned(cells // POSITIONS)
    cache = Cache.empty(isa, kind, ROWS, kv_heads, POSITIONS, head_dim)
    q = aligned(np.zeros((tokens, heads * head_dim), np.float32))
    scale = 1 / math.sqrt(head_dim)
    run = compiled(rotary_cache(isa, "rotary", heads, kv_heads, head_dim, kind, scale), isa)
    run(aligned(qkv.reshape(tokens, -1)), cos, sin, positions, rows, *cache.arrays, q)

    queries, keys, values = np.split(qkv, [heads, heads + kv_heads], axis=1)
    factor = np.float32(scale * LOG2_E)
    expected_q = turned(queries, cos[positions], sin[positions]) * factor
    np.testing.assert_array_equal(q.reshape(queries.shape), expected_q)
    plain = [np.zeros((ROWS, kv_heads, POSITIONS, head_dim), np.float32) for _ in range(2)]
    for array, heads_of_tokens in zip(plain, (turned(keys, cos[positions], sin[positions]), values), strict=True):
        array[rows, :, positions] = heads_of_tokens
    expected = Cache.of(isa, kind, *plain)
    for array, reference in zip(cache.arrays, expected.arrays, strict=True):
        np.testing.assert_array_equal(array, reference)


def test_a_head_of_odd_size_is_refused() -> None:
    isa = every_profile.args[1][0]
    with pytest.raises(ValueError, match="head_dim 7"):
        rotary_cache(isa, "rotary", 1, 1, 7, "fp16", 1.0)


def half_kernel(isa: Isa) -> Any:
    with kernel("halve") as finished:
        n = size("n")
        x, y = arguments(x=((n,), "float32"), y=((n,), "float16"))
        with T.serial(0, n // isa.lanes) as block:
            value = T.bind(load(x, block * isa.lanes, isa.lanes))
            store(y, block * isa.lanes, to_half(Vectors(isa), value), isa.lanes)
    return finished()


@every_profile
def test_halves_round_to_nearest_even(isa: Isa) -> None:
    """Every finite half, the middles between neighbours, what lies next to them, and what is not finite."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2
    special = np.array(
        [65504, 65519.99, 65520, 65536, 1e30, np.inf, np.nan, 1e-45, 2**-25, 2.0**-25 * 1.001], np.float32
    )
    positive = np.concatenate(
        [halves, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9)), special]
    )
    x = np.concatenate([positive, -positive])
    x = aligned(np.pad(x, (0, -len(x) % isa.lanes)))
    y = aligned(np.zeros(len(x), np.float16))
    compiled(half_kernel(isa), isa)(x, y)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(y, x.astype(np.float16))


@all_profiles
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_nothing_is_called_outside_of_the_kernel(isa: Isa, kind: str) -> None:
    """No helper of a compiler's runtime library: an engine is linked without one."""
    assert outside_calls(rotary_cache(isa, "rotary", 4, 2, 80, kind, 0.125), isa) == set()
