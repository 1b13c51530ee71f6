"""Small decoders as TensorRT takes them: a cache updated in place, an explicit mask, every node named; and the same
with one fault planted."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

CACHE, HEADS, KV_HEADS, WIDTH, LABELS = 64, 4, 2, 128, 96
HALF = TensorProto.FLOAT16


class Decoder:
    """Two decoder layers in fp16, whose matrix products are plain, `fp8` (both sides) or `int4` (blocks of weights)."""

    def __init__(self, precision: str = "fp16", layers: int = 2, head_dim: int = 32, width: int = WIDTH) -> None:
        self.precision, self.layers, self.head_dim, self.width = precision, layers, head_dim, width
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def model(self) -> onnx.ModelProto:
        cache = ["B", KV_HEADS, CACHE, self.head_dim]
        names = [f"{layer}.{which}" for layer in range(self.layers) for which in ("key", "value")]
        ids = [("input_ids", ["B", "S"]), ("position_ids", ["B", "S"]), ("write_indices", ["B"]), ("last_rows", ["B"])]
        given = [(name, TensorProto.INT64, shape) for name, shape in ids]
        given += [(f"past_key_values.{name}", HALF, cache) for name in names]
        made = [("logits", TensorProto.FLOAT, ["B", LABELS])] + [(f"present.{name}", HALF, cache) for name in names]
        self.begin()
        for layer in range(self.layers):
            self.layer(f"layers.{layer}", layer)
        self.end()
        graph = helper.make_graph(
            self.nodes,
            "engine",
            [helper.make_tensor_value_info(*each) for each in given],
            [helper.make_tensor_value_info(*each) for each in made],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)

    def op(self, kind: str, inputs: list[str], name: str, output: str = "", **attributes: object) -> str:
        output = output or f"{name}.out"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def constant(self, name: str, array: np.ndarray, kind: int) -> str:
        self.weights.append(helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True))
        return name

    def half(self, name: str, *shape: int) -> str:
        return self.constant(name, (self.random.standard_normal(shape) * 0.02).astype(np.float16), HALF)

    def ints(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, np.int64), TensorProto.INT64)

    def begin(self) -> None:
        self.op("Gather", [self.half("embed.weight", LABELS, self.width), "input_ids"], "embed", "layers.0.hidden")
        slots = self.constant("slots", np.arange(CACHE, dtype=np.int64), TensorProto.INT64)
        positions = self.op("Unsqueeze", ["position_ids", self.ints("mask.axes", 1, 3)], "mask.positions")
        self.op("LessOrEqual", [slots, positions], "mask.below", "mask")
        self.half("cos", CACHE, self.head_dim // 2)
        self.half("sin", CACHE, self.head_dim // 2)

    def end(self) -> None:
        rows = self.op("Unsqueeze", ["last_rows", self.ints("head.axis", 1)], "head.rows")
        last = self.op("GatherND", ["final.hidden", rows], "head.gather", batch_dims=1)
        product = self.op("MatMul", [last, self.half("lm_head.weight", self.width, LABELS)], "lm_head.matmul")
        self.op("Cast", [product], "head.cast", "logits", to=TensorProto.FLOAT)

    def matmul(self, x: str, name: str, rows: int, columns: int) -> str:
        if self.precision == "fp8":
            x, weight = self.fp8(x, name, rows, columns)
        elif self.precision == "int4":
            weight = self.int4(name, rows, columns)
        else:
            weight = self.half(f"{name}.weight", rows, columns)
        return self.op("MatMul", [x, weight], f"{name}.matmul")

    def fp8(self, x: str, name: str, rows: int, columns: int) -> tuple[str, str]:
        """E4M3 on both sides, one scale each."""
        e4m3 = TensorProto.FLOAT8E4M3FN
        zero = self.constant(f"{name}.zero", np.zeros((), ml_dtypes.float8_e4m3fn), e4m3)
        scales = [self.constant(f"{name}.{of}_scale", np.array(0.05, np.float16), HALF) for of in ("input", "weight")]
        codes = self.random.standard_normal((rows, columns)).astype(ml_dtypes.float8_e4m3fn)
        self.constant(f"{name}.weight", codes, e4m3)
        rounded = self.op("QuantizeLinear", [x, scales[0], zero], f"{name}.input_quantize")
        x = self.op("DequantizeLinear", [rounded, scales[0], zero], f"{name}.input_dequantize")
        return x, self.op("DequantizeLinear", [f"{name}.weight", scales[1], zero], f"{name}.weight_dequantize")

    def int4(self, name: str, rows: int, columns: int) -> str:
        """Weights alone, blocks of 32 along the rows."""
        packed = self.random.integers(0, 256, rows * columns // 2, dtype=np.uint8)
        codes = helper.make_tensor(f"{name}.weight", TensorProto.INT4, (rows, columns), packed.tobytes(), raw=True)
        self.weights.append(codes)
        scales = self.half(f"{name}.scales", rows // 32, columns)
        return self.op("DequantizeLinear", [codes.name, scales], f"{name}.weight_dequantize", axis=0, block_size=32)

    def heads(self, x: str, name: str, count: int) -> str:
        split = self.op("Reshape", [x, self.ints(f"{name}.shape", 0, 0, count, self.head_dim)], f"{name}.split")
        return self.op("Transpose", [split], f"{name}.transpose", perm=[0, 2, 1, 3])

    def layer(self, name: str, index: int) -> None:
        norm = self.half(f"{name}.norm.weight", self.width)
        x = self.op("RMSNormalization", [f"{name}.hidden", norm], f"{name}.norm", axis=-1, epsilon=1e-5)
        q, k, v = (
            self.heads(self.matmul(x, f"{name}.{part}", self.width, count * self.head_dim), f"{name}.{part}", count)
            for part, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        q, k = (
            self.op("RotaryEmbedding", [each, "cos", "sin", "position_ids"], f"{name}.{part}.rotary")
            for part, each in (("q", q), ("k", k))
        )
        for which, rows in (("key", k), ("value", v)):
            inputs = [f"past_key_values.{index}.{which}", rows, "write_indices"]
            self.op("TensorScatter", inputs, f"{name}.{which}", f"present.{index}.{which}", axis=2, mode="linear")
        seen = [f"present.{index}.key", f"present.{index}.value", "mask"]
        mixed = self.op("Attention", [q, *seen], f"{name}.attention", is_causal=0)
        rows = self.op("Transpose", [mixed], f"{name}.rows", perm=[0, 2, 1, 3])
        shape = self.ints(f"{name}.joined.shape", 0, 0, HEADS * self.head_dim)
        joined = self.op("Reshape", [rows, shape], f"{name}.joined")
        product = self.matmul(joined, f"{name}.o", HEADS * self.head_dim, self.width)
        output = "final.hidden" if index + 1 == self.layers else f"layers.{index + 1}.hidden"
        self.op("Add", [f"{name}.hidden", product], f"{name}.add", output)


def save(model: onnx.ModelProto, folder: Path) -> Path:
    """`model.onnx` with its weights beside it."""
    path = folder / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=256)
    return path


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def insert_before(model: onnx.ModelProto, name: str, nodes: list[onnx.NodeProto]) -> None:
    """Put nodes in front of a node, and let it take the output of the last one in place of its first input."""
    place = [node.name for node in model.graph.node].index(name)
    model.graph.node[place].input[0] = nodes[-1].output[0]
    for offset, node in enumerate(nodes):
        model.graph.node.insert(place + offset, node)


def with_softcap(model: onnx.ModelProto) -> None:
    node_of(model, "layers.1.attention").attribute.append(helper.make_attribute("softcap", 30.0))


def with_float32_attention(model: onnx.ModelProto) -> None:
    node = node_of(model, "layers.1.attention")
    place = list(model.graph.node).index(node)
    for index, name in enumerate(list(node.input[:3])):
        cast = helper.make_node("Cast", [name], [f"wide.{index}"], name=f"wide.{index}", to=TensorProto.FLOAT)
        model.graph.node.insert(place, cast)
        node.input[index] = f"wide.{index}"
    output = node.output[0]
    node.output[0] = "wide.out"
    place = list(model.graph.node).index(node)
    model.graph.node.insert(place + 1, helper.make_node("Cast", ["wide.out"], [output], name="narrow", to=HALF))


def with_unknown_operator(model: onnx.ModelProto) -> None:
    insert_before(
        model, "layers.1.q.matmul", [helper.make_node("HadamardLinear", ["layers.1.norm.out"], ["h"], "mixed")]
    )


def with_asymmetric_codes(model: onnx.ModelProto) -> None:
    scale = helper.make_tensor("asymmetric.scale", HALF, [], np.array(0.1, np.float16).tobytes(), raw=True)
    zero = helper.make_tensor("asymmetric.zero", TensorProto.UINT8, [], b"\x80", raw=True)
    model.graph.initializer.extend([scale, zero])
    nodes = [
        helper.make_node("QuantizeLinear", ["layers.1.norm.out", scale.name, zero.name], ["u8"], "asymmetric.quantize"),
        helper.make_node("DequantizeLinear", ["u8", scale.name, zero.name], ["x8"], "asymmetric.dequantize"),
    ]
    insert_before(model, "layers.1.q.matmul", nodes)


FAULTS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "softcap": with_softcap,
    "float32 attention": with_float32_attention,
    "unknown operator": with_unknown_operator,
    "asymmetric codes": with_asymmetric_codes,
}
