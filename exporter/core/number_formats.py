"""The small number formats of coded weights: what each code means, as tables.

E4M3 is OCP's FP8 without infinities (OCP 8-bit Floating Point Specification 1.0, section 5; ONNX FLOAT8E4M3FN), E2M1
the element of FP4 and E8M0 the scale of OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1. NF4 has the levels of
QLoRA (Dettmers et al. 2023, appendix E), as bitsandbytes and ONNX Runtime's MatMulBnb4 (quant_type 1) have them.
"""

from functools import cache

import ml_dtypes
import numpy as np

from exporter.core.errors import InputError

E4M3_MAX = 448.0
E5M2_MAX = 57344.0
E2M1_MAX = 6.0
E8M0_NAN = 255
E8M0_BIAS = 127
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_LEVELS = (*E2M1_MAGNITUDES, *(-magnitude for magnitude in E2M1_MAGNITUDES))
"""By code: sign in the highest of four bits; code 8 is -0."""
TABLE_KINDS = ("nf4", "nvfp4", "mxfp4")
"""Kinds whose codes are indices into a table of 16 values."""


@cache
def decode_table(kind: str) -> np.ndarray:
    """What each code of a kind of weight stands for before its scale: float32 [256] for fp8, [16] for nf4, nvfp4 and
    mxfp4. Read-only. fp8 has NaN at 0x7F and 0xFF."""
    if kind == "fp8":
        table: np.ndarray = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    elif kind in TABLE_KINDS:
        table = np.array(NF4_LEVELS if kind == "nf4" else E2M1_LEVELS, np.float32)
    else:
        raise InputError("recipe.precision", f"{kind} has no table of values", f"fp8, {', '.join(TABLE_KINDS)} have")
    table.flags.writeable = False
    return table
