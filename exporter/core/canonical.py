"""The canonical model: a Llama as three kinds of small graphs, in standard ONNX, without any weight data.

`embedding` turns ids into hidden states, one `layer` slice per decoder layer (layers of equal shape
share one structure and differ in `weights`), `head` turns chosen rows into logits. docs/design.md
lists inputs, outputs and operators. Weights are graph inputs; `Slice.weights` says what feeds them.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from exporter.core.recipe import Precision

if TYPE_CHECKING:
    # Only for the annotation below: running an engine needs no ONNX package.
    import onnx_ir as ir

OPSET = 24

EMBEDDING_INPUTS = ("input_ids",)
LAYER_INPUTS = ("hidden", "position_ids", "write_indices", "nonpad_kv_seqlen", "past_key", "past_value")
LAYER_OUTPUTS = ("hidden_out", "present_key", "present_value")
HEAD_INPUTS = ("hidden", "rows")
INTERFACES = {
    "embedding": (EMBEDDING_INPUTS, ("hidden",)),
    "layer": (LAYER_INPUTS, LAYER_OUTPUTS),
    "head": (HEAD_INPUTS, ("logits",)),
}
"""Activations and outputs of each kind of slice, in order; all other inputs are weights."""


@dataclass(frozen=True)
class CheckpointWeight:
    """A weight made of checkpoint tensors, stacked along their first axis, at some precision.

    Graph inputs that feed from it, for the weight `w` [N, K]:
    fp32: `w` float [N, K]; bf16, fp16: `w` in that type, followed by a Cast to float;
    coded: `w.codes` [N, K], `w.scales` float [N, G], G = groups of a row, and, for asymmetric integers,
    `w.zero_points` (type of the codes, [N, G]).
    Integers (INT4, UINT4, INT8 or UINT8 codes; ONNX has no type of 6 bits: int6, -32..31, is INT8) and fp8
    (FLOAT8E4M3FN) are joined by DequantizeLinear(axis 1, block_size K / G). nf4, nvfp4 and mxfp4 (UINT4 codes) are
    looked up in a table of 16 floats and multiplied: `exporter.core.table_weight`. What a recipe asks of the matrix's
    input stands between that input and MatMul: `exporter.core.rounded_input`.
    """

    sources: tuple[str, ...]
    precision: Precision = field(default_factory=Precision)


@dataclass(frozen=True)
class RotaryTable:
    """cos or sin of position * inverse frequency, times `scale`: float32 [length, head_dim / 2]."""

    function: str
    inverse_frequencies: tuple[float, ...]
    length: int
    scale: float = 1.0

    def values(self) -> np.ndarray:
        """The table, computed in float32 as the eager model does."""
        angles = np.arange(self.length, dtype=np.float32)[:, None] * np.array(self.inverse_frequencies, np.float32)
        table = np.cos(angles) if self.function == "cos" else np.sin(angles)
        return (table * np.float32(self.scale)).astype(np.float32)


@dataclass(frozen=True)
class ScaleValue:
    """The calibrated scale of a matrix's input: graph input `w.input_scale`, float [1]."""

    value: float

    def values(self) -> np.ndarray:
        """float32 [1]."""
        return np.array([self.value], np.float32)


Weight = CheckpointWeight | RotaryTable | ScaleValue


@dataclass
class Slice:
    """One graph of the canonical model. `structure` may be shared with other slices: copy before changing it.

    `kind` is `embedding`, `layer` or `head`; `index` the layer's number. `weights` maps logical
    weight names (`self_attn.qkv_proj.weight`) to what feeds them.
    """

    kind: str
    index: int | None
    structure: "ir.Model"
    weights: dict[str, Weight]

    @property
    def label(self) -> str:
        return self.kind if self.index is None else f"{self.kind} {self.index}"


@dataclass
class CanonicalModel:
    """The slices in the order the data takes."""

    embedding: Slice
    layers: list[Slice]
    head: Slice

    @property
    def slices(self) -> list[Slice]:
        return [self.embedding, *self.layers, self.head]
