"""Rows of activations that one tile of a matrix product holds in registers; what packs activations agrees on it."""

from targets.tvm.isa import Isa
from targets.tvm.tuning import DEFAULT, Tuning


def rows_per_tile(isa: Isa, tuning: Tuning = DEFAULT) -> int:
    """MR: rows of a full tile. A tile has 2 vectors of columns, so 4 * MR registers accumulate.

    Activations of M rows are packed as M // MR blocks [K / 4][MR] and, where M % MR = r > 0, one last block [K / 4][r].
    """
    if tuning.tile_rows:
        return tuning.tile_rows
    if isa.dot == "smull":
        return 4
    return 6 if isa.registers >= 32 else 4
