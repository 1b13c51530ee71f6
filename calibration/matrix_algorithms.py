"""What a recipe does with the matrices of one point: statistics wanted, scale of the input, codes of the weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from calibration.algorithms import awq, gptq, smoothquant
from calibration.observers import Observer
from calibration.rtn import wants_tensor_amax
from calibration.statistics import InputStatistics
from exporter.core.recipe import Precision, Recipe
from exporter.core.weights import QuantizedRows, row_chunks

SAMPLE_TOKENS = 512
BLOCK_ELEMENTS = 1 << 24
"""Weights given to an algorithm at a time; rows are independent of one another."""
Report = dict[str, object]


@dataclass(frozen=True)
class Wanted:
    """What must be gathered of the input of matrices at one precision under a recipe."""

    hessian: bool
    sample: int

    @staticmethod
    def of(recipe: Recipe, precision: Precision) -> "Wanted":
        by_error = precision.is_coded and bool({"gptq", "awq"} & set(recipe.algorithms))
        observed = precision.activations.endswith("/tensor") and recipe.options.observer != "absmax"
        sampled = observed or (smooths(recipe, precision))
        return Wanted(by_error, SAMPLE_TOKENS if sampled else 0)


def smooths(recipe: Recipe, precision: Precision) -> bool:
    """Whether SmoothQuant looks for a scale: it shares the difficulty between weights and activations."""
    return "smoothquant" in recipe.algorithms and bool(precision.activations)


def scales(recipe: Recipe, precision: Precision) -> bool:
    """Whether any algorithm looks for a scale of the input of such matrices."""
    return precision.is_coded and (smooths(recipe, precision) or "awq" in recipe.algorithms)


Heads = tuple[int, int, int]
"""(Hkv, query heads that share one of them, D): how the channels of attention's output are laid out."""


def search_scale(
    recipe: Recipe,
    weights: Sequence[np.ndarray],
    statistics: InputStatistics,
    precision: Precision,
    heads: Heads | None = None,
) -> tuple[np.ndarray | None, Report]:
    """The scale [K] that a point's input is divided by, and what was found; None where none is wanted, or best.

    With `heads`, query heads of one key-value head share their scale: it goes into the rows of v_proj. The report
    has the parameter chosen, and the squared error that it leaves of that without a scale.
    """
    if not scales(recipe, precision):
        return None, {}
    total = np.ones(len(statistics.amax), np.float32)
    report: Report = {}
    seen = _shared_statistics(statistics, heads)
    if smooths(recipe, precision):
        smooth = smoothquant.search_scale(list(weights), seen, precision, recipe.options.smooth_alpha)
        total *= shared_scale(smooth.scale, heads)
        report["smoothquant_alpha"] = smooth.alpha
        if smooth.losses:
            report["smoothquant_error"] = _relative(min(smooth.losses), smooth.losses[0])
    if "awq" in recipe.algorithms:
        so_far = [values * total for values in weights] if report else list(weights)
        found = awq.search_scale(so_far, seen.scaled(total) if report else seen, precision)
        total *= shared_scale(found.scale, heads)
        report["awq_ratio"] = found.ratio
        report["awq_error"] = _relative(min(found.losses), found.losses[0])
    return None if (total == 1).all() else total, report


def _relative(error: float, before: float) -> float:
    """What is left of an error; 1 where there was none."""
    return error / before if before else 1.0


def shared_scale(scale: np.ndarray, heads: Heads | None) -> np.ndarray:
    """[K] -> [K]: the geometric mean over the query heads that share a key-value head."""
    if heads is None or heads[1] == 1:
        return scale
    logs = np.log(scale.astype(np.float64)).reshape(heads).mean(axis=1, keepdims=True)
    tied: np.ndarray = np.exp(np.broadcast_to(logs, heads)).reshape(-1).astype(np.float32)
    return tied


def _shared_statistics(statistics: InputStatistics, heads: Heads | None) -> InputStatistics:
    """The same with magnitudes that the sharing heads have in common."""
    if heads is None or heads[1] == 1:
        return statistics
    amax = np.broadcast_to(statistics.amax.reshape(heads).max(axis=1, keepdims=True), heads)
    mean = np.broadcast_to(statistics.mean_abs.reshape(heads).mean(axis=1, keepdims=True), heads)
    return replace(statistics, amax=amax.reshape(-1), mean_abs=mean.reshape(-1))


def rescaled(statistics: InputStatistics, scale: np.ndarray) -> InputStatistics:
    """Statistics of x / scale, as `InputStatistics.scaled`, in the same memory."""
    by = (1 / scale.astype(np.float64)).astype(np.float32)
    statistics.amax[...] *= by
    statistics.mean_abs[...] *= by
    if statistics.hessian is not None:
        statistics.hessian[...] *= by[:, None]
        statistics.hessian[...] *= by[None, :]
    if statistics.sample is not None:
        statistics.sample[...] *= by
    return statistics


def input_clip(recipe: Recipe, precision: Precision, statistics: InputStatistics) -> float | None:
    """What an observer lets a single scale of the input reach; None where it is the largest magnitude."""
    if not precision.activations.endswith("/tensor") or recipe.options.observer == "absmax":
        return None
    assert statistics.sample is not None
    kind = precision.activations.split("/")[0]
    observer = Observer(recipe.options.observer, kind, recipe.options.percentile)
    return float(observer.amax(statistics.sample)[0, 0])


class CodeChooser:
    """Chooses the codes of the matrices that share an input. `statistics` gives up its Hessian to it."""

    def __init__(self, recipe: Recipe, precision: Precision, statistics: InputStatistics) -> None:
        self.recipe = recipe
        self.precision = precision.weight_only
        self.statistics = statistics
        self.by_gptq = precision.is_coded and "gptq" in recipe.algorithms
        clips = "awq" in recipe.algorithms and recipe.options.awq_clip and precision.is_integer
        self.by_clip = clips and not self.by_gptq
        self._factor = None
        if self.by_gptq:
            assert statistics.hessian is not None
            self._factor = gptq.factor(statistics.hessian, recipe.options)

    @property
    def chooses(self) -> bool:
        """Whether there are codes at all; without, weights are rounded to nearest."""
        return self.by_gptq or self.by_clip

    def codes(self, values: np.ndarray, tensor_amax: float | None = None) -> QuantizedRows:
        """Codes of rows [n, K]; `tensor_amax` as calibration.rtn.quantize_rows wants it."""
        if self._factor is not None:
            return gptq.quantize(values, self.precision, self._factor, self.recipe.options, tensor_amax)
        return awq.clipped(values, self.statistics, self.precision, tensor_amax)

    def blocks(
        self, shape: tuple[int, ...], read: Callable[[int, int], np.ndarray], amax: float | None = None
    ) -> Iterator[QuantizedRows]:
        """Codes of a matrix [N, K], as many rows at a time as memory allows; `read(start, stop)` gives its rows.
        `amax`, max|w| of all matrices that one scale serves, where it is not that of this one."""
        ranges = list(row_chunks(shape, BLOCK_ELEMENTS))
        if amax is None and wants_tensor_amax(self.precision):
            amax = max(float(np.abs(read(*part)).max()) for part in ranges)
        for start, stop in ranges:
            yield self.codes(read(start, stop), amax)

    @property
    def report(self) -> Report:
        """What the factorisation needed."""
        if self._factor is None:
            return {}
        dead = {"gptq_dead_channels": self._factor.dead} if self._factor.dead else {}
        return {"gptq_damping": self._factor.damping, **dead}
