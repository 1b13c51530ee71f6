"""What a recipe is: the precision asked for each kind of weight, and the algorithms that find its numbers."""

import fnmatch
from dataclasses import dataclass, field, replace

from exporter.core.errors import InputError

FLOAT_KINDS = ("fp32", "bf16", "fp16")
INTEGER_BITS = {"int8": 8, "int6": 6, "int4": 4}
CODED_FLOAT_BITS = {"fp8": 8, "nf4": 4, "nvfp4": 4, "mxfp4": 4}
SYMMETRIC_ONLY = ("int6", *CODED_FLOAT_BITS)
CHANNEL, TENSOR = -1, 0
"""Group sizes in words: one scale for a whole row of a matrix, one for the whole matrix."""
GROUP_SIZES = (16, 32, 64, 128, 256)
KIND_GROUPS = {
    "int8": (*GROUP_SIZES, CHANNEL),
    "int6": GROUP_SIZES,
    "int4": (*GROUP_SIZES, CHANNEL),
    "fp8": (TENSOR, CHANNEL),
    "nf4": GROUP_SIZES,
    "nvfp4": (16,),
    "mxfp4": (32,),
}
FIXED_GROUPS = {"nvfp4": 16, "mxfp4": 32}
ACTIVATIONS = ("int8/token", "int8/tensor", "fp8/token", "fp8/tensor", "nvfp4/tensor")
"""How the input of a matrix is rounded: `token` with a scale max|x| / top of each token, computed as it comes;
`tensor` with one scale from calibration. top is 127 for int8, 448 for fp8 (E4M3), 6 * 448 for nvfp4: E2M1 in blocks of
16, each with an E4M3 scale, computed as it comes, times the one from calibration."""
KV_CACHES = ("fp32", "fp16", "bf16", "int8", "fp8")
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, **INTEGER_BITS, **CODED_FLOAT_BITS}
ALGORITHMS = ("rotate", "smoothquant", "awq", "gptq")
NEEDING_DATA = ("smoothquant", "awq", "gptq")
ACTIVATIONS_REMEDY = (
    "int8 goes with integer weights, fp8 with fp8 ones, fp8/tensor with symmetric int4 ones too, "
    "nvfp4/tensor with nvfp4 ones"
)


@dataclass(frozen=True)
class Precision:
    """How one weight [N, K] is stored: a float type, or codes with one scale per group along K.

    `symmetric` integers are signed with no zero point (codes -8..7, -32..31, -128..127 of int4, int6, int8);
    asymmetric ones are unsigned (0..15, 0..255) with an unsigned zero point per group. fp8 is E4M3 with a float scale
    for each row or for the matrix; nf4 has 16 fixed levels and a float scale; nvfp4 is E2M1 with an E4M3 scale per 16
    and a float for the matrix; mxfp4 is E2M1 with an E8M0 scale (a power of two) per 32.
    `group_size` may be CHANNEL or TENSOR. `activations` (one of ACTIVATIONS, or empty) is what the recipe asks of the
    matrix's input.
    """

    kind: str = "fp32"
    group_size: int | None = None
    symmetric: bool = True
    activations: str = ""

    def __post_init__(self) -> None:
        if self.kind not in BITS:
            raise InputError("recipe.precision", f"unknown precision {self.kind!r}", f"use one of {', '.join(BITS)}")
        if not self.is_coded and self.group_size is not None:
            raise InputError("recipe.group_size", f"{self.kind} has no groups", "leave --group-size out")
        if self.is_coded and self.group_size not in KIND_GROUPS[self.kind]:
            allowed = ", ".join(_group_name(group) for group in KIND_GROUPS[self.kind])
            found = "none" if self.group_size is None else _group_name(self.group_size)
            raise InputError("recipe.group_size", f"group size {found} for {self.kind}", f"use one of {allowed}")
        if self.kind in SYMMETRIC_ONLY and not self.symmetric:
            raise InputError(
                "recipe.precision", f"{self.kind} with zero points", f"{self.kind} is symmetric: leave asym out"
            )
        self._check_activations()

    def _check_activations(self) -> None:
        if not self.activations:
            return
        if self.activations not in ACTIVATIONS:
            what = f"unknown precision of activations {self.activations!r}"
            raise InputError("recipe.activations", what, f"use one of {', '.join(ACTIVATIONS)}")
        if not _activations_fit(self, self.activations):
            what = f"{self.activations} activations for {self.kind} weights"
            raise InputError("recipe.activations", what, ACTIVATIONS_REMEDY)

    @property
    def is_integer(self) -> bool:
        return self.kind in INTEGER_BITS

    @property
    def is_coded(self) -> bool:
        """Whether it is stored as codes and scales: integers, fp8, nf4, nvfp4, mxfp4."""
        return self.kind in INTEGER_BITS or self.kind in CODED_FLOAT_BITS

    @property
    def bits(self) -> int:
        """Bits of one stored code, scales not counted."""
        return BITS[self.kind]

    @property
    def weight_only(self) -> "Precision":
        """The same without what is asked of activations: what decides codes and scales."""
        return replace(self, activations="") if self.activations else self

    def group_of(self, width: int) -> int:
        """Weights of a row of `width` that share a scale (the whole row for CHANNEL and TENSOR)."""
        return width if self.group_size in (None, CHANNEL, TENSOR) else int(self.group_size or 0)

    def groups(self, width: int) -> int:
        """Scales that a row of `width` has where it is stored: one for CHANNEL and TENSOR."""
        return width // self.group_of(width)

    def divides(self, width: int) -> bool:
        """Whether whole groups fill a row of `width`."""
        return width % self.group_of(width) == 0

    def describe(self) -> str:
        """Short form for people and manifests: `int4/g32/asym`, `int8/channel+int8/token`, `nvfp4`, `fp32`."""
        if not self.is_coded:
            return self.kind
        group = "" if self.kind in FIXED_GROUPS else f"/{_group_name(self.group_size or 0, 'g')}"
        asymmetric = "" if self.symmetric else "/asym"
        return f"{self.kind}{group}{asymmetric}" + (f"+{self.activations}" if self.activations else "")


def _group_name(group: int, prefix: str = "") -> str:
    return {CHANNEL: "channel", TENSOR: "tensor"}.get(group, f"{prefix}{group}")


def all_precisions() -> list[Precision]:
    """Every precision of weights there is: float kinds, then each coded kind, symmetric or not, in each group size;
    then those with rounded activations."""
    floats = [Precision(kind) for kind in FLOAT_KINDS]
    coded = [
        Precision(kind, group, symmetric)
        for kind, groups in KIND_GROUPS.items()
        for symmetric in ((True,) if kind in SYMMETRIC_ONLY else (True, False))
        for group in groups
    ]
    rounded = [replace(p, activations=a) for p in coded for a in ACTIVATIONS if _activations_fit(p, a)]
    return [*floats, *coded, *rounded]


def _activations_fit(precision: Precision, activations: str) -> bool:
    if precision.kind == "int4" and precision.symmetric and activations == "fp8/tensor":
        return True
    kind = "int8" if precision.is_integer else precision.kind
    return activations.partition("/")[0] == kind


@dataclass(frozen=True)
class Override:
    """Another precision for the matrices of decoder layers whose name (`layers.3.mlp.down_proj`) matches `pattern`
    (shell wildcards). The last override that matches wins."""

    pattern: str
    precision: Precision

    def matches(self, layer: int, name: str) -> bool:
        return fnmatch.fnmatchcase(f"layers.{layer}.{name}", self.pattern)


@dataclass(frozen=True)
class AlgorithmOptions:
    """Settings of the algorithms; docs/recipes.md explains them. `smooth_alpha` None searches it layer by layer."""

    smooth_alpha: float | None = None
    awq_clip: bool = True
    damping: float = 0.01
    act_order: bool = True
    block: int = 128
    observer: str = "absmax"
    percentile: float = 99.99


@dataclass(frozen=True)
class Recipe:
    """A named choice of precision for the decoder layers' matrices, the head and the embedding.

    Norms, biases and rotary tables always stay fp32. `kv_cache` is the storage of keys (after rotation) and values:
    `fp32`, `fp16`, `bf16`, `int8` with one scale max|x| / 127 for each position and head (or, where a target wants it,
    one from calibration), or `fp8` with one scale for all keys and one for all values of a layer, from calibration.
    `algorithms` run in the order of ALGORITHMS; without any, weights are rounded to nearest.
    """

    name: str
    linear: Precision
    lm_head: Precision
    embedding: Precision
    kv_cache: str = "fp32"
    algorithms: tuple[str, ...] = ()
    options: AlgorithmOptions = field(default_factory=AlgorithmOptions)
    overrides: tuple[Override, ...] = ()

    def layer_precision(self, layer: int, name: str) -> Precision:
        """What is asked of one matrix of a decoder layer, `self_attn.q_proj` ..."""
        for override in reversed(self.overrides):
            if override.matches(layer, name):
                return override.precision
        return self.linear

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Every precision it names."""
        return (self.linear, self.lm_head, self.embedding, *(override.precision for override in self.overrides))

    @property
    def needs_data(self) -> bool:
        """Whether its numbers come from calibration text."""
        static = any(precision.activations.endswith("/tensor") for precision in self.precisions)
        return static or self.kv_cache == "fp8" or any(name in NEEDING_DATA for name in self.algorithms)

    @property
    def calibrated(self) -> bool:
        """Whether its numbers come from a file of quantization parameters (with or without text)."""
        return self.needs_data or bool(self.algorithms)

    @property
    def lossless(self) -> bool:
        return self.parity_class == self.kv_cache == "fp32"

    @property
    def parity_class(self) -> str:
        """The row of the parity table its weights are held to: that of the coarsest precision."""
        coarsest = min(self.precisions, key=lambda p: (p.bits, p.kind != "bf16"))
        return coarsest.kind

    def with_group_size(self, group_size: int) -> "Recipe":
        """The same recipe with another group size for every integer and nf4 precision that has groups."""

        def regroup(precision: Precision) -> Precision:
            free = precision.is_coded and precision.kind not in FIXED_GROUPS and (precision.group_size or 0) > 0
            return replace(precision, group_size=group_size) if free else precision

        return replace(
            self,
            linear=regroup(self.linear),
            lm_head=regroup(self.lm_head),
            embedding=regroup(self.embedding),
            overrides=tuple(replace(each, precision=regroup(each.precision)) for each in self.overrides),
        )


def kv_cache_bytes(kind: str, head_dim: int) -> int:
    """Bytes of the key, or the value, of one head at one position."""
    return {
        "fp32": 4 * head_dim,
        "fp16": 2 * head_dim,
        "bf16": 2 * head_dim,
        "int8": head_dim + 4,
        "fp8": head_dim,
    }[kind]
