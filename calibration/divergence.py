"""Divergence of many variants of a model from the model itself, with the vocabulary read once, in blocks.

KL(p || q) = sum p (l_p - l_q) - lse(l_p) + lse(l_q) for logits l and their log-sum-exp lse. A first pass over the
vocabulary finds lse(l_p); a second one adds up the rest for every variant, block by block.
"""

from collections.abc import Callable, Iterator, Mapping

import torch

Blocks = Callable[[], Iterator[tuple[int, int, torch.Tensor]]]
"""Makes an iterator over (start, stop, float32 [C, H]): the rows of the head, in blocks."""

Rounded = Callable[[torch.Tensor, str], torch.Tensor]
"""A block of the head as a named variant has it."""


def mean_divergences(
    base: torch.Tensor, variants: Mapping[str, torch.Tensor], heads: Mapping[str, Rounded], blocks: Blocks
) -> dict[str, float]:
    """Mean KL in nats over positions, for each variant.

    base: what the head multiplies, float32 [R, H]; `variants`: the same of models that differ before the head;
    `heads`: models that differ in the head alone, by how they change its rows.
    """
    base_lse = torch.full((len(base),), -torch.inf)
    for _, _, head in blocks():
        base_lse = torch.logaddexp(base_lse, (base @ head.T).logsumexp(1))
    names = [*variants, *heads]
    lse = {name: torch.full_like(base_lse, -torch.inf) for name in names}
    crossed = {name: torch.zeros(len(base), dtype=torch.float64) for name in names}
    for _, _, head in blocks():
        expected = base @ head.T
        weights = (expected - base_lse[:, None]).exp_()
        for name in names:
            found = variants[name] @ head.T if name in variants else base @ heads[name](head, name).T
            lse[name] = torch.logaddexp(lse[name], found.logsumexp(1))
            # Differences of logits are small: they keep their digits in float32, their sum in float64.
            crossed[name] += (weights * (expected - found)).sum(1, dtype=torch.float64)
    return {name: float((crossed[name] - base_lse.double() + lse[name].double()).mean()) for name in names}
