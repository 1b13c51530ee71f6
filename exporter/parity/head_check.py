"""The head of a stage over the vocabulary in blocks: its chained logits against the reference, and the head alone."""

from collections.abc import Iterator

import numpy as np

from exporter.core.canonical import Slice
from exporter.parity.anchors import consumer
from exporter.parity.graph_slice import SliceRunner
from exporter.parity.limits import LOCAL_ERROR, within
from exporter.parity.metrics import ErrorSums, LogitComparison, LogitMetrics, relative_l2_error
from exporter.parity.reference import EagerModel
from exporter.parity.scoring import columns

LOCAL_ROWS = 16
"""Positions whose logits are compared for the head alone."""


class HeadCheck:
    """One stage's head. Weights of a block are read once for both comparisons.

    `own` [R, H] are the stage's hidden states, `exact` [R, H] the reference's; `expected` is the eager model with the
    weights this head should have, None where that is the reference.
    """

    def __init__(
        self,
        runner: SliceRunner,
        head: Slice,
        own: np.ndarray,
        exact: np.ndarray,
        expected: EagerModel | None,
        following: np.ndarray,
    ) -> None:
        probe = exact[-LOCAL_ROWS:]
        self._count = len(own)
        self._found = runner.logit_columns(head, np.concatenate([own, probe]))
        self._expected: Iterator[np.ndarray] | None = iter(columns(expected, probe)) if expected else None
        self._comparison = LogitComparison(following)
        self._local = ErrorSums()

    def block(self, reference: np.ndarray) -> None:
        """The next block of the reference's logits [R, C]."""
        found = next(self._found)
        expected = next(self._expected) if self._expected else reference[-LOCAL_ROWS:]
        self._comparison.update(reference, found[: self._count])
        self._local.add(expected, found[self._count :])

    @property
    def local_error(self) -> float:
        return self._local.value

    @property
    def metrics(self) -> LogitMetrics:
        return self._comparison.result()


def faulty_operator(runner: SliceRunner, head: Slice, hidden: np.ndarray, normed: np.ndarray) -> tuple[str, str] | None:
    """(operator, value) that is wrong in a head: its norm, if that differs from `normed` [R, H]; else the product."""
    inputs = {value.name: value for value in head.structure.graph.inputs}
    weights = [inputs.get("norm.weight"), inputs.get("lm_head.weight") or inputs.get("lm_head.weight.codes")]
    nodes = [consumer(value) if value is not None else None for value in weights]
    norm, product = nodes
    if norm is None or product is None or not norm.outputs[0].name:
        return None
    value = norm.outputs[0].name
    found = runner.head_value(head, hidden, value).reshape(normed.shape)
    node = product if within(relative_l2_error(normed, found), LOCAL_ERROR) else norm
    return node.op_type, node.outputs[0].name or ""
