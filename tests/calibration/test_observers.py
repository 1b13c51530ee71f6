"""Each observer against a direct float64 formula, at each granularity."""

import ml_dtypes
import numpy as np
import pytest

from calibration.observers import Granularity, Observer, divergence
from exporter.core.errors import InputError

GRANULARITIES = {
    "tensor": (Granularity("tensor"), (1, 1)),
    "channel": (Granularity("channel"), (1, 16)),
    "token": (Granularity("token"), (40, 1)),
    "group": (Granularity("group", 8), (40, 2)),
}


def heavy(tokens: int = 40, width: int = 16) -> np.ndarray:
    """Normal values with a few outliers."""
    return np.random.default_rng(0).standard_t(3, (tokens, width)).astype(np.float32)


def sets(values: np.ndarray, kind: str) -> list[np.ndarray]:
    """The values that share a clip, picked one by one."""
    if kind == "tensor":
        return [values.ravel()]
    if kind == "channel":
        return [values[:, k] for k in range(values.shape[1])]
    if kind == "token":
        return list(values)
    return [row[start : start + 8] for row in values for start in (0, 8)]


@pytest.mark.parametrize("kind", GRANULARITIES)
def test_absmax(kind: str) -> None:
    granularity, shape = GRANULARITIES[kind]
    found = Observer("absmax").amax(heavy(), granularity)
    assert found.shape == shape and found.dtype == np.float32
    np.testing.assert_array_equal(found.ravel(), [np.abs(part).max() for part in sets(heavy(), kind)])


@pytest.mark.parametrize("kind", GRANULARITIES)
def test_percentile(kind: str) -> None:
    granularity, _ = GRANULARITIES[kind]
    found = Observer("percentile", percentile=90.0).amax(heavy(), granularity)
    for clip, part in zip(found.ravel(), sets(heavy(), kind), strict=True):
        ordered = np.sort(np.abs(part.astype(np.float64)))
        place = 0.9 * (len(ordered) - 1)
        low, rest = int(place), place - int(place)
        expected = ordered[low] + rest * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
        assert clip == pytest.approx(expected, rel=1e-6)


def rounded(values: np.ndarray, clip: float, code: str) -> np.ndarray:
    if code == "int8":
        scale = clip / 127
        return np.clip(np.rint(values / scale), -127, 127) * scale
    scale = clip / 448
    return np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


@pytest.mark.parametrize("code", ["int8", "fp8"])
@pytest.mark.parametrize("kind", GRANULARITIES)
def test_mse_takes_the_best_clip_of_the_grid(kind: str, code: str) -> None:
    granularity, _ = GRANULARITIES[kind]
    found = Observer("mse", code).amax(heavy(), granularity)
    for clip, part in zip(found.ravel(), sets(heavy(), kind), strict=True):
        wide = part.astype(np.float64)
        grid = np.abs(wide).max() * np.arange(1, 101) / 100
        errors = [float(np.square(rounded(wide, each, code) - wide).sum()) for each in grid]
        own = float(np.square(rounded(wide, float(clip), code) - wide).sum())
        assert np.abs(grid / clip - 1).min() < 1e-6
        # Rounding in float32 may turn a tie of codes.
        assert own <= min(errors) * 1.001 + 1e-12


def nvfp4(values: np.ndarray, clip: float) -> np.ndarray:
    """Blocks of 16 in E2M1, by the types of ml_dtypes; `clip` is what the largest code and scale reach."""
    blocks, scale = values.reshape(-1, 16), clip / (6 * 448)
    own = np.minimum(np.abs(blocks).max(1, keepdims=True) / 6 / scale, 448)
    step = own.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    codes = np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0)
    return (np.clip(codes, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * step).reshape(values.shape)


@pytest.mark.parametrize("kind", ["tensor", "token"])
def test_mse_of_nvfp4_looks_at_whole_blocks(kind: str) -> None:
    values, granularity = heavy(60, 64), GRANULARITIES[kind][0]
    found = Observer("mse", "nvfp4").amax(values, granularity)
    parts = [values.reshape(1, -1)] if kind == "tensor" else [row[None] for row in values]
    for clip, part in zip(found.ravel(), parts, strict=True):
        wide = part.astype(np.float64)
        errors = [float(np.square(nvfp4(wide, c) - wide).sum()) for c in np.abs(wide).max() * np.arange(1, 101) / 100]
        own = float(np.square(nvfp4(wide, float(clip)) - wide).sum())
        assert own <= min(errors) * 1.001 + 1e-12  # rounding in float32 may turn a tie of codes


def reference_divergence(counts: np.ndarray, kept: int) -> float:
    """Migacz, GTC 2017, slide 'Pseudocode', bin by bin."""
    p = [float(c) for c in counts[:kept]]
    p[-1] += float(sum(counts[kept:]))
    q = [0.0] * kept
    for level in range(128):
        bins = [i for i in range(kept) if i * 128 // kept == level]
        filled = [i for i in bins if counts[i] > 0]
        for i in filled:
            q[i] = sum(float(counts[j]) for j in bins) / len(filled)
    if not sum(q):
        return float("inf")
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0 and b == 0:
            return float("inf")
        total += a / sum(p) * np.log((a / sum(p)) / (b / sum(q))) if a else 0.0
    return total


@pytest.mark.parametrize("kept", [128, 200, 777, 2048])
def test_divergence_equals_the_pseudocode(kept: int) -> None:
    counts, _ = np.histogram(np.abs(heavy(200, 100)), 2048)
    assert divergence(counts, kept) == pytest.approx(reference_divergence(counts, kept), rel=1e-9, abs=1e-12)


def test_entropy_takes_the_least_divergence() -> None:
    values = heavy(200, 100)
    found = float(Observer("entropy").amax(values)[0, 0])
    amax = float(np.abs(values).max())
    counts, _ = np.histogram(np.abs(values), 2048, (0, amax))
    kept = round(found / amax * 2048)
    assert found == pytest.approx(amax * kept / 2048, rel=1e-6)
    chosen = divergence(counts, kept)
    assert chosen == min(divergence(counts, each) for each in range(128, 2049))
    # 20,000 values of a heavy tail: clipping pays.
    assert found < amax


@pytest.mark.parametrize("rule", ["absmax", "percentile", "mse", "entropy"])
def test_zeros_have_no_magnitude(rule: str) -> None:
    found = Observer(rule).amax(np.zeros((4, 16), np.float32), Granularity("token"))
    np.testing.assert_array_equal(found, np.zeros((4, 1), np.float32))


def test_refused() -> None:
    for make in (
        lambda: Observer("median"),
        lambda: Observer("percentile", percentile=0),
        lambda: Granularity("row"),
        lambda: Granularity("group"),
    ):
        with pytest.raises(InputError):
            make()
