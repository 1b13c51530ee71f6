"""Changes of a checkpoint's weights that leave its function as it is: norms folded, bases rotated, channels scaled.

They are applied in order, each to what the ones before it left. `calibration.transformed` reads the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from exporter.core.config import ModelConfig
from exporter.core.errors import InputError

POINTS = ("attention_input", "attention_output", "mlp_input", "mlp_hidden")
"""Where a decoder layer multiplies by matrices: after the first norm, before o_proj, after the second norm, before
down_proj."""
CONSUMERS: dict[str, tuple[str, ...]] = {
    "attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_output": ("self_attn.o_proj",),
    "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_hidden": ("mlp.down_proj",),
}
"""The matrices that multiply the vector at a point: they share its statistics, and one scale where it is rounded."""
NORMS = {"attention_input": "input_layernorm", "mlp_input": "post_attention_layernorm"}


@dataclass(frozen=True)
class FoldNorms:
    """Multiplies the weights gamma of every RMSNorm into the columns of the matrices that take its output; gamma
    becomes 1. The head takes part, so embedding and head are two matrices afterwards."""


@dataclass(frozen=True)
class RotateResidual:
    """Rotates the residual stream by a seeded orthogonal Q: every hidden state h becomes h Q.

    QuaRot (arXiv:2404.00456, section 4, stage 1a) and R1 of SpinQuant (arXiv:2405.16406). It commutes with an RMSNorm
    only where gamma is 1: FoldNorms comes first.
    """

    seed: int = 0


@dataclass(frozen=True)
class RotateHeads:
    """Rotates the values of every head by a seeded orthogonal matrix [D, D], which o_proj undoes: R2 of SpinQuant,
    stage 1c of QuaRot without the online part across heads."""

    seed: int = 0


@dataclass(frozen=True, eq=False)
class ScaleInput:
    """Divides the vector at a point of a layer by `scale`, channel by channel, and multiplies the columns of the
    matrices that take it (SmoothQuant, arXiv:2211.10438, equation 3; AWQ, arXiv:2306.00978, equation 4).

    scale: float32 [K], all positive. The division goes into what produces the vector: the norm's gamma
    (attention_input, mlp_input), the rows of up_proj (mlp_hidden), or the rows of v_proj (attention_output: scale
    [Hkv * D], repeated over the query heads that share a head of values).
    """

    layer: int
    point: str
    scale: np.ndarray

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise InputError("transform.point", f"no point {self.point!r} in a layer", f"one of {', '.join(POINTS)}")
        if self.layer < 0:
            raise InputError("transform.layer", f"no layer {self.layer}", "layers count from 0")
        object.__setattr__(self, "scale", _checked_scale(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScaleInput):
            return NotImplemented
        return (self.layer, self.point) == (other.layer, other.point) and np.array_equal(self.scale, other.scale)

    def __hash__(self) -> int:
        return hash((self.layer, self.point, self.scale.tobytes()))


Transform = FoldNorms | RotateResidual | RotateHeads | ScaleInput


def point_width(config: ModelConfig, point: str) -> int:
    """Channels K of the vector at a point (`head_input`: what the head takes)."""
    widths = {
        "attention_output": config.num_heads * config.head_dim,
        "mlp_hidden": config.intermediate_size,
    }
    return widths.get(point, config.hidden_size)


def scale_width(config: ModelConfig, point: str) -> int:
    """Length of the scale of a ScaleInput."""
    return config.num_kv_heads * config.head_dim if point == "attention_output" else point_width(config, point)


def point_of(module: str) -> str:
    """`self_attn.q_proj` -> `attention_input`: the point whose vector a matrix of a layer takes."""
    return next(point for point, consumers in CONSUMERS.items() if module in consumers)


def check_transforms(transforms: Sequence[Transform], config: ModelConfig) -> None:
    """InputError for a layer that is not there, a scale of another width, a rotation where a norm's gamma is not 1."""
    plain_norms = False
    for transform in transforms:
        if isinstance(transform, FoldNorms):
            plain_norms = True
        if isinstance(transform, RotateResidual) and not plain_norms:
            what = "the residual stream is rotated while the norms still have weights"
            raise InputError("transform.order", what, "fold the norms directly before")
        if isinstance(transform, ScaleInput):
            _check_fits(transform, config)
            plain_norms = plain_norms and transform.point not in NORMS


def transformed_config(config: ModelConfig, transforms: Sequence[Transform]) -> ModelConfig:
    """The architecture afterwards: folded norms untie the head from the embedding."""
    if not config.tie_word_embeddings or not any(isinstance(transform, FoldNorms) for transform in transforms):
        return config
    return replace(config, tie_word_embeddings=False, raw={**config.raw, "tie_word_embeddings": False})


def _checked_scale(transform: ScaleInput) -> np.ndarray:
    scale = np.array(transform.scale, np.float32)
    where = f"scale of {transform.point} in layer {transform.layer}"
    if scale.ndim != 1:
        raise InputError("transform.scale", f"{where} has shape {list(scale.shape)}", "one number a channel")
    bad = np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))
    if bad.size:
        what = f"{where}: channel {bad[0]} has {scale[bad[0]]:g}, and {bad.size - 1} others are like it"
        raise InputError("transform.scale", what, "scales are positive finite numbers")
    scale.flags.writeable = False
    return scale


def _check_fits(transform: ScaleInput, config: ModelConfig) -> None:
    if transform.layer >= config.num_layers:
        what = f"a scale of layer {transform.layer} of a model with {config.num_layers}"
        raise InputError("transform.layer", what, "the parameters belong to another checkpoint")
    width = scale_width(config, transform.point)
    if transform.scale.size != width:
        what = f"layer {transform.layer}: {transform.point} has {width} channels, its scale {transform.scale.size}"
        raise InputError("transform.shape", what, "the parameters belong to another checkpoint")
