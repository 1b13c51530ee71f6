"""What a canonical value stands for while its slice is lowered: mostly work that is not written yet.

A value is written as kernel calls only when something needs its numbers, so that what follows it (a bias, a
residual, a gate, the quantization of activations) can be taken into the same kernel.
"""

from dataclasses import dataclass
from typing import Any

from exporter.core.canonical import CheckpointWeight, Weight


@dataclass(frozen=True)
class StepInput:
    """An input of the slice that says something about the step: `input_ids`, `write_indices`, `past_key`, ..."""

    name: str


@dataclass(frozen=True)
class WeightRef:
    """A weight. `part` is set for codes, scales and zero points until DequantizeLinear joins them; `cast` says that
    a half-precision weight still awaits its Cast to float; `transposed` that a Transpose stood behind it."""

    name: str
    weight: Weight
    part: str = ""
    cast: bool = False
    transposed: bool = False

    @property
    def is_plain(self) -> bool:
        return not (self.part or self.cast or self.transposed)


@dataclass(frozen=True)
class Matrix:
    """A transposed weight matrix [K, N] that products read; stored as [rows, width] = [N, K]."""

    name: str
    weight: CheckpointWeight
    rows: int
    width: int


@dataclass(frozen=True)
class Stream:
    """The residual stream [T, H] after `version` additions; `flat` once its rows are counted through, `chosen` once
    the wanted rows are picked."""

    version: int = 0
    flat: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class Norm:
    """RMSNorm of the stream."""

    stream: Stream
    gamma: WeightRef
    epsilon: float


@dataclass(frozen=True)
class Rounded:
    """A value as a recipe asks for it in front of a matrix: rounded to `activations`, such as int8/token."""

    x: "Lowered"
    activations: str


@dataclass(frozen=True)
class Product:
    """x times a matrix, plus a bias."""

    x: "Lowered"
    matrix: Matrix
    bias: WeightRef | None = None


@dataclass(frozen=True)
class Part:
    """One of the parts of a product's columns."""

    product: Product
    widths: tuple[int, ...]
    index: int


@dataclass(frozen=True)
class Activated:
    """x * sigmoid(x) of the first half of a product."""

    part: Part


@dataclass(frozen=True)
class Gated:
    """silu(first half) * second half of a product."""

    product: Product


@dataclass(frozen=True)
class Heads:
    """A part of the packed projection as heads; `tables` (cos, sin) once it is rotated."""

    part: Part
    heads: int
    head_dim: int
    heads_first: bool = False
    tables: tuple[WeightRef, WeightRef] | None = None


@dataclass(frozen=True)
class Cached:
    """`past_key` or `past_value` with this step's positions written; `live` once it is cut to the longest row."""

    past: str
    heads: Heads
    live: bool = False


@dataclass(frozen=True)
class LongestRow:
    """max(nonpad_kv_seqlen)."""


@dataclass(frozen=True)
class Attended:
    """Causal attention of this step's queries; its layout follows the Transpose and Reshape behind it."""

    query: Heads
    key: Cached
    value: Cached
    scale: float
    heads_first: bool = True
    merged: bool = False


Lowered = Any
"""One of the above."""
