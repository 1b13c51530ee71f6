"""What a recipe is: the precision asked for each kind of weight."""

from dataclasses import dataclass, replace

from exporter.core.errors import InputError

FLOAT_KINDS = ("fp32", "bf16", "fp16")
INTEGER_BITS = {"int8": 8, "int6": 6, "int4": 4}
SYMMETRIC_ONLY = ("int6",)
GROUP_SIZES = (16, 32, 64, 128, 256)
KV_CACHES = ("fp32", "fp16", "int8")
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, **INTEGER_BITS}


@dataclass(frozen=True)
class Precision:
    """How one weight [N, K] is stored: a float type, or integer codes with one scale per group along K.

    `symmetric` integers are signed with no zero point (codes -8..7, -32..31, -128..127 of int4, int6, int8);
    asymmetric ones are unsigned (0..15, 0..255) with an unsigned zero point per group; int6 is symmetric only.
    """

    kind: str = "fp32"
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.kind not in BITS:
            raise InputError("recipe.precision", f"unknown precision {self.kind!r}", f"use one of {', '.join(BITS)}")
        if self.is_integer and self.group_size not in GROUP_SIZES:
            raise InputError(
                "recipe.group_size",
                f"group size {self.group_size} for {self.kind}",
                f"use one of {', '.join(map(str, GROUP_SIZES))}",
            )
        if not self.is_integer and self.group_size is not None:
            raise InputError("recipe.group_size", f"{self.kind} has no groups", "leave --group-size out")
        if self.kind in SYMMETRIC_ONLY and not self.symmetric:
            raise InputError(
                "recipe.precision", f"{self.kind} with zero points", f"{self.kind} is symmetric: leave asym out"
            )

    @property
    def is_integer(self) -> bool:
        return self.kind in INTEGER_BITS

    @property
    def bits(self) -> int:
        """Bits of one stored code, scales not counted."""
        return BITS[self.kind]

    def describe(self) -> str:
        """Short form for people and manifests: `int4/g32`, `int4/g32/asym`, `fp32`."""
        if not self.is_integer:
            return self.kind
        return f"{self.kind}/g{self.group_size}" + ("" if self.symmetric else "/asym")


def all_precisions() -> list[Precision]:
    """Every precision there is: float kinds, then each integer kind, symmetric or not, in each group size."""
    floats = [Precision(kind) for kind in FLOAT_KINDS]
    integers = [
        Precision(kind, group, symmetric)
        for kind in INTEGER_BITS
        for symmetric in ((True,) if kind in SYMMETRIC_ONLY else (True, False))
        for group in GROUP_SIZES
    ]
    return [*floats, *integers]


@dataclass(frozen=True)
class Recipe:
    """A named choice of precision for the decoder layers' matrices, the head and the embedding.

    Norms, biases and rotary tables always stay fp32. `kv_cache` is the storage of keys (after rotation) and values:
    `fp32`, `fp16`, or `int8` with one scale max|x| / 127 for each position and head.
    """

    name: str
    linear: Precision
    lm_head: Precision
    embedding: Precision
    kv_cache: str = "fp32"

    @property
    def lossless(self) -> bool:
        return self.parity_class == self.kv_cache == "fp32"

    @property
    def parity_class(self) -> str:
        """The row of the parity table its weights are held to: that of the coarsest precision."""
        coarsest = min((self.linear, self.lm_head, self.embedding), key=lambda p: (p.bits, p.kind != "bf16"))
        return coarsest.kind

    def with_group_size(self, group_size: int) -> "Recipe":
        """The same recipe with another group size for every integer precision."""

        def regroup(precision: Precision) -> Precision:
            return replace(precision, group_size=group_size) if precision.is_integer else precision

        return replace(
            self,
            linear=regroup(self.linear),
            lm_head=regroup(self.lm_head),
            embedding=regroup(self.embedding),
        )


def kv_cache_bytes(kind: str, head_dim: int) -> int:
    """Bytes of the key, or the value, of one head at one position."""
    return {"fp32": 4 * head_dim, "fp16": 2 * head_dim, "int8": head_dim + 4}[kind]
