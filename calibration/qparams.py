"""Quantization parameters in one file, read on demand (docs/qparams.md)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.transforms import Transform
from exporter.core.checkpoint import Checkpoint
from exporter.core.recipe import Precision, Recipe
from exporter.core.weights import QuantizedRows


@dataclass(frozen=True)
class QParams:
    """One file of parameters. Opening reads its header and the transforms' scales; the rest comes when asked for."""

    path: Path
    source_digest: str
    recipe: Recipe
    data: Mapping[str, object] | None
    transforms: tuple[Transform, ...]
    reports: Mapping[str, Mapping[str, object]]
    part: str | None

    @staticmethod
    def open(path: Path | str) -> "QParams":
        raise NotImplementedError

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        raise NotImplementedError

    def check(self, checkpoint: Checkpoint) -> None:
        """InputError (`qparams.other_checkpoint`) unless the file was made from this checkpoint and fits it."""
        raise NotImplementedError

    def rows(self, tensor: str, precision: Precision, start: int, stop: int) -> QuantizedRows | None:
        """Rows [start, stop) of a tensor as an algorithm chose them; None: round the transformed values to nearest."""
        raise NotImplementedError

    def input_amax(self, module: str) -> np.ndarray | None:
        """Largest |x| of each input channel of `model.layers.0.self_attn.q_proj` or `lm_head`: float32 [K]."""
        raise NotImplementedError

    def input_scale(self, module: str, activations: str) -> float:
        """The scale that rounds a module's whole input: amax / 127 (int8/..) or amax / 448 (fp8/..)."""
        raise NotImplementedError

    def kv_amax(self, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Largest |k| (after rotation) and |v| of each channel: float32 [Hkv * D] each."""
        raise NotImplementedError

    def kv_scales(self, layer: int, kind: str) -> tuple[float, float]:
        """Scales of all keys and of all values of a layer for a cache of `int8` or `fp8`."""
        raise NotImplementedError
