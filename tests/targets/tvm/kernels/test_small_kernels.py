"""Norms, quantization and embedding bring all they need, on every profile."""

import pytest

from exporter.core.recipe import Precision
from targets.tvm.isa import Isa
from tests.targets.tvm.kernels.calls import all_profiles, outside_calls

pytest.importorskip("tvm")
from targets.tvm.kernels.embedding import embedding_float, embedding_int
from targets.tvm.kernels.norm import norm
from targets.tvm.kernels.quantize import norm_quantize, quantize
from targets.tvm.kernels.round_fp8 import round_fp8


@all_profiles
def test_nothing_outside_is_called(isa: Isa) -> None:
    kernels = [
        norm(isa, "norm", 45, 1e-5),
        norm_quantize(isa, "norm_quantize", 64, 32, 1e-5, gather=True, rounding="shared-exponent"),
        quantize(isa, "quantize", 64, 16),
        quantize(isa, "quantize", 80, 16, rounding="token"),
        embedding_int(isa, "embedding_int", Precision("int4", 32, symmetric=False), 40, 64),
        *(embedding_float(isa, "embedding_float", kind, 40, 64) for kind in ("fp32", "bf16", "fp16", "fp8")),
        embedding_int(isa, "embedding_nvfp4", Precision("nvfp4", 16), 40, 64),
        embedding_int(isa, "embedding_nf4", Precision("nf4", 16), 40, 64),
        round_fp8(isa, "round_fp8", 45),
    ]
    assert [outside_calls(kernel, isa) for kernel in kernels] == [set()] * len(kernels)
