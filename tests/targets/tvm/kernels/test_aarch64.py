"""The kernels' own tests on aarch64, under emulation: some of their cases."""

import pytest

pytest.importorskip("tvm", reason="apache-tvm is not installed")

from exporter.core.recipe import CHANNEL, Precision
from targets.tvm.isa import PROFILES, Isa
from tests.support.qemu import aarch64
from tests.targets.tvm.kernels import (
    test_embedding,
    test_linear_float,
    test_linear_int,
    test_norm,
    test_quantize,
    test_rotary_cache,
    test_round_fp8,
)

CASES = {
    "norm": (test_norm, "test_rows_are_normalized", (75,)),
    "quantize": (test_quantize, "test_codes_scales_and_sums_are_exact", (96, 32, "group")),
    "exponents": (test_quantize, "test_codes_scales_and_sums_are_exact", (96, 32, "shared-exponent")),
    "ties": (test_quantize, "test_ties_go_to_even_and_zeros_stay_zero", ("shared-exponent",)),
    "norm_quantize": (test_quantize, "test_norm_quantize_is_norm_and_then_quantize", (True, "token")),
    "bounds": (test_quantize, "test_exponents_at_their_bounds", ()),
    "int4": (test_linear_int, "test_sums_are_exact", (Precision("int4", 32),)),
    "int4-asymmetric": (test_linear_int, "test_sums_are_exact", (Precision("int4", 32, False),)),
    "int6": (test_linear_int, "test_sums_are_exact", (Precision("int6", 32),)),
    "nvfp4": (test_linear_int, "test_sums_are_exact", (Precision("nvfp4", 16),)),
    "mxfp4": (test_linear_int, "test_sums_are_exact", (Precision("mxfp4", 32),)),
    "nf4": (test_linear_int, "test_nf4_is_multiplied_by_its_levels_in_16_bits", (64,)),
    "embedding-nf4": (test_embedding, "test_integer_rows_are_exact", (Precision("nf4", 64),)),
    "channel": (test_linear_int, "test_scales_of_rows", (Precision("int8", CHANNEL, activations="int8/token"), 96)),
    "int8": (test_linear_int, "test_sums_are_exact", (Precision("int8", 32),)),
    "int8-asymmetric": (test_linear_int, "test_sums_are_exact", (Precision("int8", 32, False),)),
    "embedding": (test_embedding, "test_integer_rows_are_exact", (Precision("int4", 32, False),)),
    "embedding-nvfp4": (test_embedding, "test_integer_rows_are_exact", (Precision("nvfp4", 16),)),
    "fp32": (test_linear_float, "test_any_number_of_rows", ("fp32",)),
    "bf16": (test_linear_float, "test_any_number_of_rows", ("bf16",)),
    "fp16": (test_linear_float, "test_any_number_of_rows", ("fp16",)),
    "fp8": (test_linear_float, "test_any_number_of_rows", ("fp8",)),
    "embedding-fp8": (test_embedding, "test_fp8_rows_are_exact", ()),
    "round_fp8": (test_round_fp8, "test_all_codes_ties_and_their_neighbours", ()),
    "halves": (test_rotary_cache, "test_halves_round_to_nearest_even", ()),
}

PLAIN = PROFILES["aarch64-neon"]
# The profiles differ in how they multiply bytes, so that all else is the same code on each of them.
RUNS = [
    (isa, case)
    for isa in PROFILES.values()
    if isa.machine == "aarch64"
    for case in CASES
    if isa is PLAIN or CASES[case][0] is test_linear_int
]


@pytest.mark.parametrize(("isa", "case"), RUNS, ids=lambda given: getattr(given, "name", given))
def test_on_aarch64(isa: Isa, case: str, tmp_path, monkeypatch) -> None:
    emulated = aarch64()
    module, name, arguments = CASES[case]
    monkeypatch.setattr(module, "compiled", lambda function, isa: emulated.kernel(function, isa, tmp_path))
    getattr(module, name)(isa, *arguments)
