"""Some rows of a large tensor, read in few pieces."""

from collections.abc import Iterable

import numpy as np

# Reading 8 extra rows costs less than another read call.
ROW_GAP = 8


def row_ranges(ids: np.ndarray) -> list[tuple[int, int]]:
    """Few ranges of rows [start, stop) that cover the sorted distinct `ids`."""
    breaks = np.flatnonzero(np.diff(ids) > ROW_GAP) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(ids, breaks) if len(part)]


def rows_of(ids: np.ndarray, pieces: Iterable[np.ndarray]) -> np.ndarray:
    """The rows `ids` (sorted, distinct) out of the pieces read for `row_ranges(ids)`."""
    kept = []
    for (start, stop), piece in zip(row_ranges(ids), pieces, strict=True):
        inside = ids[(ids >= start) & (ids < stop)]
        kept.append(piece[inside - start])
    return np.concatenate(kept)
