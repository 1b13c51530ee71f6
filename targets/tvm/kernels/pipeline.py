"""Settings under which kernels are compiled."""

import tvm

SKIPPED_PASSES = ("s_tir.CompactBufferAllocation",)
"""It looks for buffers larger than what is used of them, in time that grows with the square of the unrolled statements
(6 of 8 seconds for attention); our kernels have none."""


def compiling() -> tvm.transform.PassContext:
    """The context to call tvm.compile in."""
    return tvm.transform.PassContext(opt_level=3, disabled_pass=list(SKIPPED_PASSES))
