"""Codes for a head of a few labels, out of those that an algorithm chose for the whole head."""

from dataclasses import dataclass

from calibration.transforms import Transform, transformed_config
from calibration.weight_rows import StoredWeights, joined_rows
from exporter.core.checkpoint import HEAD
from exporter.core.labelled import LabelledCheckpoint
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows


@dataclass(frozen=True)
class LabelledCodes:
    """`stored` with the rows `token_ids` of the matrix `source` as those of `lm_head.weight`."""

    stored: StoredWeights
    source: str
    token_ids: tuple[int, ...]

    def rows(self, tensor: str, precision: Precision, start: int, stop: int) -> QuantizedRows | None:
        """`StoredWeights.rows`. A matrix has codes of all its rows or of none."""
        if tensor != HEAD:
            return self.stored.rows(tensor, precision, start, stop)
        found = [self.stored.rows(self.source, precision, token, token + 1) for token in self.token_ids[start:stop]]
        parts = [part for part in found if part is not None]
        return joined_rows(parts) if parts else None


def labelled_codes(
    stored: StoredWeights, checkpoint: LabelledCheckpoint, transforms: tuple[Transform, ...]
) -> LabelledCodes:
    """`stored` holds codes of the checkpoint that the labels were taken from, after `transforms`."""
    source = transformed_config(checkpoint.original.config, transforms).head_source
    return LabelledCodes(stored, source, checkpoint.token_ids)
