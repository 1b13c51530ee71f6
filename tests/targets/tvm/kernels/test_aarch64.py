"""The kernels' own tests on aarch64, under emulation: some of their cases."""

import pytest

pytest.importorskip("tvm", reason="apache-tvm is not installed")

from exporter.core.recipe import Precision
from targets.tvm.isa import PROFILES, Isa
from tests.support.qemu import aarch64
from tests.targets.tvm.kernels import (
    test_embedding,
    test_linear_float,
    test_linear_int,
    test_norm,
    test_quantize,
    test_rotary_cache,
)

CASES = {
    "norm": (test_norm, "test_rows_are_normalized", (75,)),
    "quantize": (test_quantize, "test_codes_scales_and_sums_are_exact", (96, 32, False)),
    "exponents": (test_quantize, "test_codes_scales_and_sums_are_exact", (96, 32, True)),
    "ties": (test_quantize, "test_ties_go_to_even_and_zeros_stay_zero", (True,)),
    "norm_quantize": (test_quantize, "test_norm_quantize_is_norm_and_then_quantize", (True, True)),
    "bounds": (test_quantize, "test_exponents_at_their_bounds", ()),
    "int4": (test_linear_int, "test_sums_are_exact", (Precision("int4", 32),)),
    "int4-asymmetric": (test_linear_int, "test_sums_are_exact", (Precision("int4", 32, False),)),
    "int6": (test_linear_int, "test_sums_are_exact", (Precision("int6", 32),)),
    "int8": (test_linear_int, "test_sums_are_exact", (Precision("int8", 32),)),
    "int8-asymmetric": (test_linear_int, "test_sums_are_exact", (Precision("int8", 32, False),)),
    "embedding": (test_embedding, "test_integer_rows_are_exact", (Precision("int4", 32, False),)),
    "fp32": (test_linear_float, "test_any_number_of_rows", ("fp32",)),
    "bf16": (test_linear_float, "test_any_number_of_rows", ("bf16",)),
    "fp16": (test_linear_float, "test_any_number_of_rows", ("fp16",)),
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
