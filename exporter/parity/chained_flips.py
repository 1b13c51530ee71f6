"""How far a simulation parts from itself over the whole model, where every layer begins a little off.

An engine in half precision adds the terms of a product in another order in a batch than alone, or in a chunk: its
values are off by the rounding of its arithmetic. Where codes of activations flip at that, logits part by as much as
flips make, however right the engine is. This measures that: the simulation is run beside itself, disturbed by the
arithmetic's unit roundoff before every layer.
"""

from collections.abc import Sequence

import numpy as np

from exporter.parity.metrics import relative_l2_error
from exporter.parity.reference import EagerModel

DRAWS = 4


def chained_flips(
    simulation: EagerModel, rows: Sequence[np.ndarray], positions: Sequence[np.ndarray], roundoff: float
) -> float:
    """The largest relative L2 of logits at one of the `positions` of each row of ids, over DRAWS disturbed runs."""
    generator = np.random.default_rng(0)

    def disturbed(state: np.ndarray) -> np.ndarray:
        noise = generator.standard_normal(state.shape, np.float32) * np.float32(roundoff)
        return state * (1 + noise)

    exact = simulation.embed(rows)
    others = [list(exact) for _ in range(DRAWS)]
    for index in range(simulation.config.num_layers):
        layer = simulation.layer(index)
        exact = [layer.run(state).hidden for state in exact]
        others = [[layer.run(disturbed(state)).hidden for state in states] for states in others]
        del layer
    expected = simulation.logits(_chosen(exact, positions))
    errors = []
    for states in others:
        found = simulation.logits(disturbed(_chosen(states, positions)))
        errors += [relative_l2_error(one, other) for one, other in zip(expected, found, strict=True)]
    return max(errors)


def _chosen(states: Sequence[np.ndarray], positions: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([state[where] for state, where in zip(states, positions, strict=True)])
