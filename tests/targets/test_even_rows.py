"""A token's result does not depend on how many rows are computed with it."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from exporter.core.recipe import GROUP_SIZES, Precision, Recipe
from targets.onnxruntime.engine_graph import MICROSOFT, EngineGraph
from targets.onnxruntime.even_rows import EvenRows, needs_even_rows
from tests.targets.engines import build, build_source, random_ids

FLOAT = ir.DataType.FLOAT
ROWS, WIDTH = 40, 512


def session(bits: int, block: int) -> ort.InferenceSession:
    """x [B, S, K] times random codes, on even rows where they are needed."""
    rng, graph = np.random.default_rng(0), EngineGraph()
    arrays = {
        "codes": rng.integers(0, 256, (ROWS, WIDTH // block, block * bits // 8), np.uint8),
        "scales": rng.random((ROWS, WIDTH // block), np.float32),
    }
    weight = [graph.initializer(ir.tensor(array, name=name)) for name, array in arrays.items()]
    attributes = {"K": WIDTH, "N": ROWS, "bits": bits, "block_size": block, "accuracy_level": 4}

    def product(x: ir.Value) -> ir.Value:
        return graph.op("MatMulNBits", [x, *weight], "product", domain=MICROSOFT, attributes={**attributes})

    x = graph.input("x", FLOAT, ["batch", "sequence", WIDTH])
    y = EvenRows(graph, x, axes=2).multiply(x, "y", product) if needs_even_rows(bits, block) else product(x)
    graph.output(y, FLOAT, ["batch", "sequence", ROWS])
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    model = ir.to_proto(graph.model()).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("block", GROUP_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_products_are_the_same_in_any_company(bits, block):
    product = session(bits, block)
    x = np.random.default_rng(1).standard_normal((3, 20, WIDTH)).astype(np.float32)
    whole = product.run(None, {"x": x})[0]
    for row in range(3):
        for size in (1, 3, 5, 7, 20):
            for start in range(0, 20, size):
                part = x[row : row + 1, start : start + size]
                np.testing.assert_array_equal(product.run(None, {"x": part})[0][0], whole[row, start : start + size])
    np.testing.assert_array_equal(product.run(None, {"x": x[:, 7:8]})[0], whole[:, 7:8])


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_engines_compute_a_prompt_as_its_chunks(tiny_checkpoint, tmp_path, kind, group):
    precision = Precision(kind, group)
    checkpoint = tiny_checkpoint("gqa", hidden_size=128, head_dim=32)
    engine = build(build_source(checkpoint, Recipe("r", precision, precision, precision)), tmp_path)
    ids = random_ids(engine.config, 1, 20)
    with engine.runner() as runner:
        whole = runner.prefill(ids, np.array([20]))
        runner.prefill(ids[:, :7], np.array([7]))
        runner.extend(ids[:, 7:10], np.array([3]))
        np.testing.assert_array_equal(runner.extend(ids[:, 10:], np.array([10])), whole)
