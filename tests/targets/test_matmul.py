"""MatMulNBits and GatherBlockQuantized on our bytes, operator by operator, against plain arithmetic."""

import numpy as np
import onnx_ir as ir
import pytest

from calibration.codecs import container_bits, pack_zero_points, to_matmul_nbits
from calibration.rtn import quantize_rows
from exporter.core.recipe import Precision, all_precisions
from exporter.core.weights import QuantizedRows
from targets.onnxruntime.engine_graph import MICROSOFT, EngineGraph

FLOAT = ir.DataType.FLOAT
ROWS, WIDTH = 48, 512
PRECISIONS = [precision for precision in all_precisions() if precision.is_integer]


def run(graph: EngineGraph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    model = ir.to_proto(graph.model()).SerializeToString()
    result: np.ndarray = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    return result


def operands(graph: EngineGraph, rows: QuantizedRows, blocked: bool) -> list[ir.Value]:
    codes = to_matmul_nbits(rows)
    arrays = {"codes": codes if blocked else codes.reshape(len(codes), -1), "scales": rows.scales}
    zero_points = pack_zero_points(rows)
    if zero_points is not None:
        arrays["zero_points"] = zero_points
    return [graph.initializer(ir.tensor(array, name=name)) for name, array in arrays.items()]


@pytest.fixture
def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("precision", PRECISIONS, ids=Precision.describe)
def test_products_are_those_of_int8_activations(weights, precision, tokens):
    """Activations are rounded to int8 per group, everything else is exact: float32 sums of 512 terms differ by
    rounding alone, well below 1e-5 of the result's norm."""
    rows = quantize_rows(weights, precision)
    x = np.random.default_rng(1).standard_normal((tokens, WIDTH)).astype(np.float32)
    graph = EngineGraph()
    inputs = [graph.input("x", FLOAT, ["tokens", WIDTH]), *operands(graph, rows, blocked=True)]
    attributes = {"K": WIDTH, "N": ROWS, "bits": container_bits(precision), "block_size": precision.group_size}
    y = graph.op("MatMulNBits", inputs, "y", domain=MICROSOFT, attributes={**attributes, "accuracy_level": 4})
    graph.output(y, FLOAT, ["tokens", ROWS])
    groups = x.reshape(tokens, -1, precision.group_size)
    amax = np.abs(groups).max(-1, keepdims=True)
    rounded = (np.round(groups * (np.float32(127) / amax)) * (amax / 127)).reshape(x.shape)
    want = rounded.astype(np.float64) @ rows.dequantize().astype(np.float64).T
    assert np.linalg.norm(run(graph, {"x": x}) - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("precision", PRECISIONS, ids=Precision.describe)
def test_gathered_rows_are_dequantized_exactly(weights, precision):
    rows = quantize_rows(weights, precision)
    graph = EngineGraph()
    ids = graph.input("ids", ir.DataType.INT64, ["tokens"])
    codes, *parameters = operands(graph, rows, blocked=False)
    bits = container_bits(precision)
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": precision.group_size, "bits": bits}
    y = graph.op("GatherBlockQuantized", [codes, ids, *parameters], "y", domain=MICROSOFT, attributes={**attributes})
    graph.output(y, FLOAT, ["tokens", WIDTH])
    indices = np.array([0, 47, 3, 3, 31])
    np.testing.assert_array_equal(run(graph, {"ids": indices}), rows.dequantize()[indices])
