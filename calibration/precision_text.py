"""Precisions as people write them: the form `Precision.describe` writes."""

from exporter.core.errors import InputError
from exporter.core.recipe import ACTIVATIONS, BITS, CHANNEL, FIXED_GROUPS, KIND_GROUPS, TENSOR, Precision

DEFAULT_GROUP_SIZE = 32
GROUP_NAMES = {"channel": CHANNEL, "tensor": TENSOR}


def parse_precision(text: str, group_size: int = DEFAULT_GROUP_SIZE) -> Precision:
    """`int4`, `int4/g128`, `int4/g32/asym`, `int8/channel+int8/token`, `fp8/tensor`, `nf4/g64`, `nvfp4`, `bf16`, ...

    `group_size` holds where the text names none and the kind has such groups. Raises InputError.
    """
    weights, plus, activations = text.partition("+")
    kind, *options = weights.split("/")
    symmetric, group = True, None
    for option in options:
        found = _group(option)
        if option == "asym" and symmetric:
            symmetric = False
        elif found is not None and group is None:
            group = found
        else:
            raise InputError("recipe.precision", f"precision {text!r}: {option!r} means nothing", precision_forms())
    if kind not in BITS or (options and kind not in KIND_GROUPS) or (plus and activations not in ACTIVATIONS):
        raise InputError("recipe.precision", f"unknown precision {text!r}", precision_forms())
    return Precision(kind, default_group(kind, group_size) if group is None else group, symmetric, activations)


def default_group(kind: str, group_size: int | None = None) -> int | None:
    """What a kind is grouped by where nobody says: `group_size` if it has such groups; fp8 has one scale a matrix."""
    allowed = KIND_GROUPS.get(kind, ())
    if not allowed:
        return None
    if group_size in allowed:
        return group_size
    return FIXED_GROUPS.get(kind, TENSOR if kind == "fp8" else DEFAULT_GROUP_SIZE)


def precision_forms() -> str:
    """What a precision may look like, for remedies."""
    return (
        f"use one of {', '.join(BITS)}; with a group int4/g128, int8/channel, fp8/tensor; with zero points "
        f"int4/g32/asym; with rounded activations int8/channel+int8/token (one of {', '.join(ACTIVATIONS)})"
    )


def _group(option: str) -> int | None:
    if option in GROUP_NAMES:
        return GROUP_NAMES[option]
    return int(option[1:]) if option[:1] == "g" and option[1:].isdecimal() else None
