"""Writes a file of quantization parameters in a stream; nothing half-written ever has its name."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from calibration.qparams import QParams
from calibration.transforms import Transform
from exporter.core.recipe import Recipe
from exporter.core.weights import QuantizedRows


class QParamsWriter:
    """`with QParamsWriter(path, source_digest=.., recipe=.., data=..) as writer:` add things, then `writer.finish()`.

    Leaving the block without `finish` removes what was written. `part` marks a file that holds one layer of a
    calibration under way; `add_part` takes its content over.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        source_digest: str,
        recipe: Recipe,
        data: Mapping[str, object] | None = None,
        part: str | None = None,
    ) -> None:
        raise NotImplementedError

    def add_transform(self, transform: Transform) -> None:
        """The next of the ordered transforms."""

    def add_codes(self, tensor: str, blocks: QuantizedRows | Iterable[QuantizedRows]) -> None:
        """All rows of a tensor, in order, at one precision."""

    def add_input_amax(self, layer: int | None, point: str, amax: np.ndarray, clip: float | None = None) -> None:
        """Largest |x| a channel at a point of a layer (None and `head_input`: of the head): float32 [K].

        `clip`: the magnitude that a single scale should reach, where an observer chose less than the largest.
        """

    def add_kv_amax(self, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Largest |k| and |v| a channel: float32 [Hkv * D] each."""

    def add_report(self, name: str, report: Mapping[str, object]) -> None:
        """What an algorithm found (`model.layers.0.mlp.down_proj`: alpha, damping ...), JSON-ready."""

    def add_part(self, part: QParams) -> None:
        """Everything of a part: transforms, codes, statistics, reports."""

    def finish(self) -> QParams:
        """Writes header and data under the final name and opens the result."""
        raise NotImplementedError

    def __enter__(self) -> "QParamsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError
