"""The kernels of coded weights on the bytes that the engine stores, operator by operator, against plain arithmetic."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from calibration.rtn import quantize_rows
from exporter.core.number_formats import decode_table
from exporter.core.recipe import CHANNEL, TENSOR, Precision, all_precisions
from exporter.core.weights import QuantizedRows
from targets.onnxruntime.engine_graph import MICROSOFT, EngineGraph
from targets.onnxruntime.stored_rows import StoredRows, in_blocks, stored_bits, stored_group, stored_rows

FLOAT = ir.DataType.FLOAT
ROWS, WIDTH = 48, 512
CODED = [precision for precision in all_precisions() if precision.is_coded and not precision.activations]
BLOCKED = [precision for precision in CODED if in_blocks(precision)]
NF4 = [precision for precision in CODED if precision.kind == "nf4"]
FP8 = [precision for precision in CODED if precision.kind == "fp8"]


def run(graph: EngineGraph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    model = ir.to_proto(graph.model()).SerializeToString()
    result: np.ndarray = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    return result


def quantized(weights: np.ndarray, precision: Precision) -> QuantizedRows:
    return quantize_rows(weights, precision, float(np.abs(weights).max()))


def stored(rows: QuantizedRows) -> tuple[StoredRows, int]:
    """As the engine's file has them, and the group that each scale is for."""
    group = stored_group(rows.precision, WIDTH)
    return stored_rows(rows, group), group


def initializers(graph: EngineGraph, **arrays: np.ndarray | None) -> list[ir.Value]:
    return [graph.initializer(ir.tensor(array, name=name)) for name, array in arrays.items() if array is not None]


@pytest.fixture
def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)


def inputs(tokens: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((tokens, WIDTH)).astype(np.float32)


def hold(got: np.ndarray, x: np.ndarray, rows: QuantizedRows) -> None:
    """Products in float64: float32 sums of 512 terms differ by rounding alone, well below 1e-5 of the norm."""
    want = x.astype(np.float64) @ rows.dequantize().astype(np.float64).T
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("precision", BLOCKED, ids=Precision.describe)
def test_products_are_those_of_int8_activations(weights, precision, tokens):
    """Activations are rounded to int8 per block, everything else is exact."""
    rows, x = quantized(weights, precision), inputs(tokens)
    lies, group = stored(rows)
    graph = EngineGraph()
    codes = lies.codes.reshape(ROWS, WIDTH // group, -1)
    weight = initializers(graph, codes=codes, scales=lies.scales, zero_points=lies.zero_points)
    attributes = {"K": WIDTH, "N": ROWS, "bits": stored_bits(precision), "block_size": group, "accuracy_level": 4}
    given = [graph.input("x", FLOAT, ["tokens", WIDTH]), *weight]
    y = graph.op("MatMulNBits", given, "y", domain=MICROSOFT, attributes={**attributes})
    graph.output(y, FLOAT, ["tokens", ROWS])
    groups = x.reshape(tokens, -1, group)
    amax = np.abs(groups).max(-1, keepdims=True)
    rounded = (np.round(groups * (np.float32(127) / amax)) * (amax / 127)).reshape(x.shape)
    hold(run(graph, {"x": x}), rounded, rows)


@pytest.mark.parametrize("precision", BLOCKED, ids=Precision.describe)
def test_gathered_rows_are_dequantized_exactly(weights, precision):
    rows = quantized(weights, precision)
    lies, group = stored(rows)
    graph = EngineGraph()
    codes, *parameters = initializers(
        graph, codes=lies.codes.reshape(ROWS, -1), scales=lies.scales, zero_points=lies.zero_points
    )
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": group, "bits": stored_bits(precision)}
    given = [codes, graph.input("ids", ir.DataType.INT64, ["tokens"]), *parameters]
    y = graph.op("GatherBlockQuantized", given, "y", domain=MICROSOFT, attributes={**attributes})
    graph.output(y, FLOAT, ["tokens", WIDTH])
    indices = np.array([0, 47, 3, 3, 31])
    np.testing.assert_array_equal(run(graph, {"ids": indices}), rows.dequantize()[indices])


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_every_code_of_e2m1_is_an_integer_of_eight_bits(kind):
    """All 16 codes with scales over the range of both formats, subnormal ones too: the same float32 values."""
    precision = Precision(kind, {"nvfp4": 16, "mxfp4": 32}[kind])
    codes = np.tile(np.arange(16, dtype=np.uint8), (254, 2))
    scales = np.repeat(np.float32(2) ** np.arange(-126, 128, dtype=np.float32)[:, None], 32 // precision.group_size, 1)
    scales = scales if kind == "mxfp4" else scales * np.float32(1.75 / 2)
    scales = np.minimum(scales, np.float32(2.0**124))  # 6 times larger ones are no float32
    rows = QuantizedRows(codes, scales, None, precision)
    lies = stored_rows(rows, precision.group_size)
    values = (lies.codes.astype(np.float32) - 128).reshape(254, -1, precision.group_size) * lies.scales[:, :, None]
    np.testing.assert_array_equal(values.reshape(254, 32), rows.dequantize())


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("precision", NF4, ids=Precision.describe)
def test_nf4_products_take_float_activations(weights, precision, tokens):
    rows, x = quantized(weights, precision), inputs(tokens)
    lies, group = stored(rows)
    graph = EngineGraph()
    weight = initializers(graph, codes=lies.codes.reshape(-1), absmax=lies.scales.reshape(-1))
    attributes = {"K": WIDTH, "N": ROWS, "block_size": group, "quant_type": 1}
    given = [graph.input("x", FLOAT, ["tokens", WIDTH]), *weight]
    y = graph.op("MatMulBnb4", given, "y", domain=MICROSOFT, attributes={**attributes})
    graph.output(y, FLOAT, ["tokens", ROWS])
    hold(run(graph, {"x": x}), x, rows)


def test_nf4_codes_lie_as_onnxruntime_quantizes_them():
    """Its own quantizer, on values that are levels: the same bytes, so the same nibble order and level numbers."""
    from onnxruntime.capi._pybind_state import quantize_matmul_bnb4

    codes = np.random.default_rng(2).integers(0, 16, (8, 64)).astype(np.uint8)
    codes[:, ::16] = 15  # the largest magnitude of each block, so that scales come out the same
    scales = np.random.default_rng(3).uniform(0.5, 2, (8, 4)).astype(np.float32)
    rows = QuantizedRows(codes, scales, None, Precision("nf4", 16))
    packed, absmax = np.zeros(256, np.uint8), np.zeros(32, np.float32)
    # The array is [K, N] to the quantizer, whose flattened order is that of [N, K].
    quantize_matmul_bnb4(packed, rows.dequantize(), absmax, 16, 1, 8, 64)
    lies = stored_rows(rows, 16)
    np.testing.assert_array_equal(packed, lies.codes.reshape(-1))
    np.testing.assert_array_equal(absmax, lies.scales.reshape(-1))


def fp8_values(bytes_: np.ndarray) -> np.ndarray:
    return bytes_.view(ml_dtypes.float8_e4m3fn)


def fp8_graph(codes: np.ndarray, scales: np.ndarray) -> tuple[EngineGraph, ir.Value]:
    """DequantizeLinear with a scale [N, 1] for each row."""
    graph = EngineGraph()
    given = initializers(graph, codes=fp8_values(codes), scales=scales[:, 0])
    return graph, graph.op("DequantizeLinear", given, "w", attributes={"axis": 0})


@pytest.mark.parametrize("precision", FP8, ids=Precision.describe)
def test_fp8_products(weights, precision):
    rows, x = quantized(weights, precision), inputs(7)
    graph, w = fp8_graph(rows.codes, rows.scales)
    given = [graph.input("x", FLOAT, ["tokens", WIDTH]), w]
    graph.output(
        graph.op("FusedMatMul", given, "y", domain=MICROSOFT, attributes={"transB": 1}), FLOAT, ["tokens", ROWS]
    )
    hold(run(graph, {"x": x}), x, rows)


def test_every_byte_of_fp8_is_decoded_exactly():
    codes = np.arange(256, dtype=np.uint8)[None]
    graph, w = fp8_graph(codes, np.array([[0.5]], np.float32))
    graph.output(graph.op("Identity", [w], "y"), FLOAT, [1, 256])
    np.testing.assert_array_equal(run(graph, {}), decode_table("fp8")[None] * np.float32(0.5))


@pytest.mark.parametrize("group", [CHANNEL, TENSOR])
def test_gathered_rows_of_fp8_are_exact(weights, group):
    rows = quantized(weights, Precision("fp8", group))
    graph = EngineGraph()
    codes, scales = initializers(graph, codes=fp8_values(rows.codes), scales=rows.scales)
    given = [codes, graph.input("ids", ir.DataType.INT64, ["tokens"]), scales]
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": 0, "bits": 8}
    y = graph.op("GatherBlockQuantized", given, "y", domain=MICROSOFT, attributes={**attributes})
    graph.output(y, FLOAT, ["tokens", WIDTH])
    indices = np.array([0, 47, 3, 3, 31])
    np.testing.assert_array_equal(run(graph, {"ids": indices}), rows.dequantize()[indices])
