"""How far apart two models are: relative L2, Kullback-Leibler divergence, perplexity, agreement of the top token.

Everything is float64 and streams over columns of the vocabulary: logits of all positions never exist at once.
"""

import math
from dataclasses import dataclass

import numpy as np


def relative_l2_error(reference: np.ndarray, candidate: np.ndarray) -> float:
    """|candidate - reference| / |reference| over all elements; infinite if either is not finite."""
    sums = ErrorSums()
    sums.add(reference, candidate)
    return sums.value


@dataclass
class ErrorSums:
    """A relative L2 error whose parts arrive one after another."""

    error: float = 0.0
    reference: float = 0.0

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        if reference.shape != candidate.shape:
            raise ValueError(f"shapes differ: {reference.shape} and {candidate.shape}")
        exact = reference.astype(np.float64)
        difference = candidate.astype(np.float64) - exact
        self.error += float(np.vdot(difference, difference))
        self.reference += float(np.vdot(exact, exact))

    @property
    def value(self) -> float:
        if not math.isfinite(self.error) or not math.isfinite(self.reference):
            return math.inf
        if self.reference == 0.0:
            return 0.0 if self.error == 0.0 else math.inf
        return math.sqrt(self.error / self.reference)


@dataclass(frozen=True)
class LogitMetrics:
    """Two models on the same positions. Divergences in nats; never finite where a logit was not."""

    positions: int
    relative_l2_error: float
    kl_divergence_mean: float
    kl_divergence_max: float
    perplexity_reference: float
    perplexity: float
    top1_agreement: float

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.perplexity_reference


class LogitComparison:
    """KL(reference || candidate), perplexities and agreement over R positions, from blocks of vocabulary columns.

    `targets` [R] are the ids that really follow (-1: unknown, left out of perplexity). One pass: sums are kept
    relative to a running maximum, as in online softmax, so KL = E_p[x - y] - logsumexp(x) + logsumexp(y).
    """

    def __init__(self, targets: np.ndarray) -> None:
        self.targets = targets
        self._columns = 0
        self._l2 = ErrorSums()
        self._reference, self._candidate = _OnlineSoftmax(targets), _OnlineSoftmax(targets)
        self._gap = np.zeros(len(targets))

    def update(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """The next columns of the logits, [R, C] each."""
        self._l2.add(reference, candidate)
        x, y = reference.astype(np.float64), candidate.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            weights, rescale = self._reference.update(x, self._columns)
            self._gap = self._gap * rescale + np.einsum("rc,rc->r", weights, x - y)
            self._candidate.update(y, self._columns)
        self._columns += x.shape[1]

    def result(self) -> LogitMetrics:
        error = self._l2.value
        if not math.isfinite(error):
            return LogitMetrics(
                len(self.targets),
                relative_l2_error=math.inf,
                kl_divergence_mean=math.inf,
                kl_divergence_max=math.inf,
                perplexity_reference=math.nan,
                perplexity=math.nan,
                top1_agreement=0.0,
            )
        x, y = self._reference, self._candidate
        kl = np.maximum(self._gap / x.total - x.log_sum() + y.log_sum(), 0.0)
        return LogitMetrics(
            len(self.targets),
            error,
            float(kl.mean()),
            float(kl.max()),
            x.perplexity(),
            y.perplexity(),
            float((x.best == y.best).mean()),
        )


class _OnlineSoftmax:
    """Maximum, sum of exponentials, arg max and the target's logit of each row, over columns that stream by."""

    def __init__(self, targets: np.ndarray) -> None:
        rows = len(targets)
        self.targets = targets
        self.maximum = np.full(rows, -np.inf)
        self.total = np.zeros(rows)
        self.best = np.zeros(rows, np.int64)
        self.target_logit = np.zeros(rows)

    def update(self, logits: np.ndarray, first_column: int) -> tuple[np.ndarray, np.ndarray]:
        """Exponentials [R, C] relative to the new maximum, and the factor [R] that older sums shrink by."""
        local = logits.argmax(axis=1)
        highest = np.take_along_axis(logits, local[:, None], axis=1)[:, 0]
        self.best = np.where(highest > self.maximum, first_column + local, self.best)
        maximum = np.maximum(self.maximum, highest)
        rescale = np.exp(self.maximum - maximum)
        exponentials = np.exp(logits - maximum[:, None])
        self.total = self.total * rescale + exponentials.sum(axis=1)
        self.maximum = maximum
        column = self.targets - first_column
        here = np.flatnonzero((column >= 0) & (column < logits.shape[1]) & (self.targets >= 0))
        self.target_logit[here] = logits[here, column[here]]
        return exponentials, rescale

    def log_sum(self) -> np.ndarray:
        return self.maximum + np.log(self.total)

    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of the known targets; NaN if there are none."""
        known = self.targets >= 0
        if not known.any():
            return math.nan
        mean = float((self.log_sum() - self.target_logit)[known].mean())
        return math.exp(mean) if mean < 700.0 else math.inf
