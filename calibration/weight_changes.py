"""What transforms do to one tensor: operations along its columns and along its rows."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from calibration.rotation import Rotation
from calibration.transforms import CONSUMERS, NORMS, FoldNorms, RotateHeads, RotateResidual, ScaleInput, Transform
from exporter.core.checkpoint import EMBEDDING, HEAD
from exporter.core.config import ModelConfig

FINAL_NORM = "model.norm.weight"
LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
INTO_RESIDUAL = ("self_attn.o_proj", "mlp.down_proj")
FROM_RESIDUAL = (*CONSUMERS["attention_input"], *CONSUMERS["mlp_input"])
PRODUCERS = {
    "attention_input": "input_layernorm",
    "attention_output": "self_attn.v_proj",
    "mlp_input": "post_attention_layernorm",
    "mlp_hidden": "mlp.up_proj",
}


@dataclass(frozen=True)
class Scale:
    """x * factors along the last axis: [b, n] and float64 [n]."""

    factors: np.ndarray

    def apply(self, vectors: np.ndarray, start: int) -> np.ndarray:
        """`vectors` [b, w] are the channels from `start` on."""
        return np.asarray(vectors * self.factors[start : start + vectors.shape[1]])


@dataclass(frozen=True)
class Rotate:
    """x Q along the last axis, block by block of Q's size."""

    rotation: Rotation

    def apply(self, vectors: np.ndarray, start: int) -> np.ndarray:
        """`vectors` [b, w] hold whole blocks."""
        return self.rotation.apply(vectors.reshape(-1, self.rotation.size)).reshape(vectors.shape)


@dataclass(frozen=True)
class Ones:
    """1 in place of x: a norm whose weights were folded."""

    def apply(self, vectors: np.ndarray, start: int) -> np.ndarray:
        return np.ones_like(vectors)


Operation = Scale | Rotate | Ones


@dataclass(frozen=True)
class Change:
    """Operations on a tensor [N, K], in order: along rows of K numbers, and along columns of N. A vector [N] is one
    column. The two kinds commute."""

    along_rows: tuple[Operation, ...] = ()
    along_columns: tuple[Operation, ...] = ()

    @property
    def span(self) -> int:
        """Rows that mix with one another: a block of so many must be read together."""
        return max((op.rotation.size for op in self.along_columns if isinstance(op, Rotate)), default=1)

    def __bool__(self) -> bool:
        return bool(self.along_rows or self.along_columns)

    def __add__(self, other: "Change") -> "Change":
        return Change(self.along_rows + other.along_rows, self.along_columns + other.along_columns)


ReadNorm = Callable[[int, str], np.ndarray]
"""(n, name of a norm's weight) -> its values after the first n transforms, float64."""


def change_of(name: str, transforms: Sequence[Transform], config: ModelConfig, read_norm: ReadNorm) -> Change:
    """What the transforms do, one after the other, to the tensor of this name."""
    found = LAYER_TENSOR.fullmatch(name)
    layer = int(found[1]) if found else None
    module, kind = (found[2], found[3]) if found else (name, "weight")
    change = Change()
    for count, transform in enumerate(transforms):
        match transform:
            case FoldNorms():
                change += _fold(layer, module, kind, partial(read_norm, count))
            case RotateResidual(seed):
                change += _rotate_residual(module, kind, Rotate(Rotation(config.hidden_size, seed)))
            case RotateHeads(seed):
                change += _rotate_heads(module, kind, Rotate(Rotation(config.head_dim, seed)))
            case ScaleInput() if transform.layer == layer:
                change += _scale(transform, module, kind, config.num_heads // config.num_kv_heads, config.head_dim)
    return change


def _fold(layer: int | None, module: str, kind: str, read_norm: Callable[[str], np.ndarray]) -> Change:
    if module in (*NORMS.values(), FINAL_NORM):
        return Change(along_columns=(Ones(),))
    if module == HEAD:
        return Change(along_rows=(Scale(read_norm(FINAL_NORM)),))
    norm = next((NORMS[point] for point in NORMS if module in CONSUMERS[point] and kind == "weight"), None)
    return Change(along_rows=(Scale(read_norm(f"model.layers.{layer}.{norm}.weight")),)) if norm else Change()


def _rotate_residual(module: str, kind: str, rotate: Rotate) -> Change:
    """Weights from the stream W Q, weights and biases into it Q^T W and b Q."""
    if module in INTO_RESIDUAL:
        return Change(along_columns=(rotate,))
    reads = module in (EMBEDDING, HEAD) or (module in FROM_RESIDUAL and kind == "weight")
    return Change(along_rows=(rotate,)) if reads else Change()


def _rotate_heads(module: str, kind: str, rotate: Rotate) -> Change:
    if module == "self_attn.v_proj":
        return Change(along_columns=(rotate,))
    return Change(along_rows=(rotate,)) if (module, kind) == ("self_attn.o_proj", "weight") else Change()


def _scale(transform: ScaleInput, module: str, kind: str, sharing: int, head_dim: int) -> Change:
    """`sharing`: query heads that take the values of one head."""
    scale = transform.scale.astype(np.float64)
    if module == PRODUCERS[transform.point]:
        return Change(along_columns=(Scale(1 / scale),))
    if module not in CONSUMERS[transform.point] or kind != "weight":
        return Change()
    if transform.point == "attention_output":
        scale = np.repeat(scale.reshape(-1, head_dim), sharing, axis=0).reshape(-1)
    return Change(along_rows=(Scale(scale),))
