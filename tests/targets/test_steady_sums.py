"""Rows of float products with decoded matrices do not depend, to the last bit, on how many there are."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from targets.onnxruntime.engine_graph import EngineGraph
from targets.onnxruntime.even_rows import EvenRows
from targets.onnxruntime.steady_sums import steady_product

FLOAT = ir.DataType.FLOAT
COUNTS = (*range(1, 14), 16, 17, 31, 64, 65, 128, 255)


class Alone:
    """What a product asks of the lowering around it."""

    def __init__(self, graph: EngineGraph, rows: EvenRows) -> None:
        self.graph, self.rows = graph, rows


def session(weight: np.ndarray, threads: int) -> ort.InferenceSession:
    """x [B, S, K] times int8 codes [N, K] that are decoded in the graph: no constant, so nothing is packed for it."""
    graph = EngineGraph()
    arrays = {"codes": weight, "scales": np.random.default_rng(2).random(len(weight), np.float32)}
    given = [graph.initializer(ir.tensor(array, name=name)) for name, array in arrays.items()]
    decoded = graph.op("DequantizeLinear", given, "decoded", attributes={"axis": 0})
    x = graph.input("x", FLOAT, ["batch", "sequence", weight.shape[1]])
    low = Alone(graph, EvenRows(graph, x, axes=2))
    y = steady_product(low, x, decoded, weight.shape, "y")  # type: ignore[arg-type]
    graph.output(y, FLOAT, ["batch", "sequence", len(weight)])
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    model = ir.to_proto(graph.model()).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(("rows", "width"), [(64, 96), (38, 688), (64, 1500), (256, 768), (45, 300), (7, 300)])
def test_rows_are_the_same_in_any_company(rows: int, width: int, threads: int) -> None:
    random = np.random.default_rng(1)
    codes = random.integers(-127, 128, (rows, width)).astype(np.int8)
    product, x = session(codes, threads), random.standard_normal((1, 256, width)).astype(np.float32)
    whole = product.run(None, {"x": x})[0]
    exact = x[0].astype(np.float64) @ codes.T * np.random.default_rng(2).random(rows, np.float32)
    np.testing.assert_allclose(whole[0], exact, atol=1e-5 * np.abs(exact).max())
    for count in COUNTS:
        for start in (0, 256 - count):
            part = x[:, start : start + count]
            np.testing.assert_array_equal(product.run(None, {"x": part})[0], whole[:, start : start + count])
    batch = x.reshape(4, 64, width)
    np.testing.assert_array_equal(product.run(None, {"x": batch})[0].reshape(whole.shape), whole)
