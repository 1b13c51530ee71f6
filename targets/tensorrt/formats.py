"""Which form each precision of weights takes in the strongly typed graph, and what its matrices multiply.

A form is chosen by what TensorRT-RTX 1.7 makes of it, as its builder reports the layers of the engine:

float    values in their own type: one product
rows     8-bit codes and a float32 scale for each row. With rounded inputs: one 8-bit product into float32. Without:
         one kernel that decodes while it multiplies
int4     codes and half-precision scales of blocks: one kernel that decodes while it multiplies
blocks   8-bit codes and float32 scales of blocks: decoded to half precision by a kernel of its own in every step
nvfp4    E2M1 codes, E4M3 scales of blocks of 16, a float32: with rounded inputs one FP4 product, else decoded apart
"""

from typing import Literal

from exporter.core.recipe import CHANNEL, TENSOR, Precision, Recipe
from targets.base import ASKED_ROUNDINGS, ActivationRounding

Form = Literal["float", "rows", "int4", "blocks", "nvfp4"]
INT4_BLOCKS = (128, 64, 32, 16)
"""That TensorRT decodes while it multiplies."""
SCALE_BITS: dict[Form, int] = {"rows": 32, "int4": 16, "blocks": 32, "nvfp4": 8}


def form_of(precision: Precision) -> Form:
    """The form of a precision that the target takes at all (support.py)."""
    if not precision.is_coded:
        return "float"
    if precision.kind in ("int4", "nvfp4"):
        return "int4" if precision.kind == "int4" else "nvfp4"
    return "rows" if precision.group_size in (CHANNEL, TENSOR) else "blocks"


def rounds_inputs(precision: Precision) -> bool:
    """Whether the input of a matrix is rounded as its recipe asks: where a product of the codes themselves follows.
    Elsewhere it stays in half precision, which is finer."""
    return bool(precision.activations) and form_of(precision) in ("rows", "nvfp4")


def activation_rounding(precision: Precision) -> ActivationRounding | None:
    """How engines round what a matrix of this precision multiplies; None: not at all."""
    return ASKED_ROUNDINGS[precision.activations] if rounds_inputs(precision) else None


def stored_group(precision: Precision, width: int) -> int:
    """Weights of a row of `width` that have one scale in the file; 0 where int4 has no block that divides it.

    int4: larger groups are cut into blocks, their scales repeated. A block as wide as the row would be taken for a
    scale of the row, and the matrix decoded apart in every step.
    """
    group = precision.group_of(width)
    if form_of(precision) != "int4":
        return group
    fitting = [block for block in INT4_BLOCKS if group % block == 0]
    return next((block for block in fitting if block < width), max(fitting, default=0))


def arithmetic(recipe: Recipe) -> str:
    """`bf16` where the recipe names it for weights, else `fp16`: the type of attention and its cache, and of products
    with decoded weights."""
    return "bf16" if any(precision.kind == "bf16" for precision in recipe.precisions) else "fp16"


def matrix_bits(precision: Precision, rows: int, width: int) -> int:
    """Bits of a matrix [rows, width] in model.onnx.data: codes and scales. Not counted: the scale of a whole matrix,
    which lies in model.onnx, or for each row of a stack of such matrices."""
    form = form_of(precision)
    if form == "float":
        return rows * width * precision.bits
    codes = rows * width * (4 if precision.bits == 4 else 8)
    if precision.group_size == TENSOR:
        return codes
    groups = width // (stored_group(precision, width) or width)
    return codes + rows * groups * SCALE_BITS[form]
