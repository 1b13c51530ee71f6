"""How many positions the KV cache of an engine has: static, for it is part of the graph."""

from targets.base import Limits

MULTIPLE = 8


def cache_length(limits: Limits) -> int:
    """One position more than a row may have, for what a resting row of a full cache writes; a multiple of 8."""
    return -(-(limits.max_seq_len + 1) // MULTIPLE) * MULTIPLE
