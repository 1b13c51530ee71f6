"""A plain graph with the inputs and outputs of a TensorRT engine, written straight from a checkpoint: stands beside the
one that a build makes, and shares nothing with it."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from exporter.core.checkpoint import Checkpoint
from exporter.core.rope import inverse_frequencies

TYPES = {
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}


def write_contract_graph(
    checkpoint: Checkpoint, path: Path, cache_length: int, arithmetic: str = "fp16", labels: tuple[int, ...] = ()
) -> Path:
    """`model.onnx` with its weights beside it; a classifier of `labels` (token ids) where some are given."""
    graph = _Graph(checkpoint, cache_length, arithmetic, labels)
    model = graph.model()
    onnx.save(model, str(path), save_as_external_data=True, location=path.name + ".data", size_threshold=256)
    return path


class _Graph:
    def __init__(self, checkpoint: Checkpoint, cache_length: int, arithmetic: str, labels: tuple[int, ...]) -> None:
        self.checkpoint, self.config, self.length, self.labels = checkpoint, checkpoint.config, cache_length, labels
        self.onnx_type, self.dtype = TYPES[arithmetic]
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def model(self) -> onnx.ModelProto:
        ids, caches, presents = TensorProto.INT64, [], []
        inputs = [("input_ids", ids, ["B", "S"]), ("position_ids", ids, ["B", "S"]), ("last_rows", ids, ["B"])]
        shape = ["B", self.config.num_kv_heads, self.length, self.config.head_dim]
        if not self.labels:
            inputs.insert(2, ("write_indices", ids, ["B"]))
            names = [f"{i}.{which}" for i in range(self.config.num_layers) for which in ("key", "value")]
            caches = [(f"past_key_values.{name}", self.onnx_type, shape) for name in names]
            presents = [(f"present.{name}", self.onnx_type, shape) for name in names]
        hidden = self.op("Gather", [self.weight("model.embed_tokens.weight"), "input_ids"], "layers.0.hidden")
        mask = None if self.labels else self.mask()
        self.tables()
        for index in range(self.config.num_layers):
            last = index + 1 == self.config.num_layers
            hidden = self.layer(index, hidden, mask, "final.hidden" if last else f"layers.{index + 1}.hidden")
        self.head(hidden)
        outputs = [("logits", TensorProto.FLOAT, ["B", len(self.labels) or self.config.vocab_size]), *presents]
        graph = helper.make_graph(
            self.nodes,
            "contract",
            [helper.make_tensor_value_info(*each) for each in (*inputs, *caches)],
            [helper.make_tensor_value_info(*each) for each in outputs],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
        model.ir_version = 12
        return model

    def op(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, array: np.ndarray) -> str:
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        self.weights.append(helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True))
        return name

    def weight(self, name: str, transpose: bool = False, rows: tuple[int, ...] = ()) -> str:
        array = np.asarray(self.checkpoint.read(name), np.float32)
        array = array[list(rows)] if rows else array
        made = name + (".T" if transpose else "")
        return self.constant(made, np.ascontiguousarray(array.T if transpose else array).astype(self.dtype))

    def mask(self) -> str:
        """bool [B, 1, S, M]: what lies at or before a position."""
        columns = self.constant("columns", np.arange(self.length, dtype=np.int64))
        axes = self.constant("mask_axes", np.array([1, 3], np.int64))
        return self.op("LessOrEqual", [columns, self.op("Unsqueeze", ["position_ids", axes], "positions")], "mask")

    def tables(self) -> None:
        frequencies = inverse_frequencies(self.config.rope, self.config.head_dim).astype(np.float64)
        angles = np.arange(self.config.max_position_embeddings)[:, None] * frequencies
        self.constant("rotary.cos", np.cos(angles).astype(self.dtype))
        self.constant("rotary.sin", np.sin(angles).astype(self.dtype))

    def linear(self, x: str, name: str, output: str) -> str:
        biased = f"{name}.bias" in self.checkpoint.tensors
        product = self.op("MatMul", [x, self.weight(f"{name}.weight", True)], f"{output}.product" if biased else output)
        return self.op("Add", [product, self.weight(f"{name}.bias")], output) if biased else product

    def norm(self, x: str, name: str, output: str) -> str:
        attributes = {"axis": -1, "epsilon": self.config.rms_norm_eps}
        return self.op("RMSNormalization", [x, self.weight(name)], output, **attributes)

    def heads(self, x: str, count: int, output: str) -> str:
        shape = self.constant(f"{output}.shape", np.array([0, 0, count, self.config.head_dim], np.int64))
        split = self.op("Reshape", [x, shape], f"{output}.split")
        return self.op("Transpose", [split], output, perm=[0, 2, 1, 3])

    def layer(self, index: int, hidden: str, mask: str | None, output: str) -> str:
        place, name = f"layers.{index}", f"model.layers.{index}"
        x = self.norm(hidden, f"{name}.input_layernorm.weight", f"{place}.input_layernorm")
        mixed = self.attention(index, x, mask)
        added = self.op("Add", [hidden, mixed], f"{place}.after_attention")
        x = self.norm(added, f"{name}.post_attention_layernorm.weight", f"{place}.post_attention_layernorm")
        gate = self.linear(x, f"{name}.mlp.gate_proj", f"{place}.gate")
        up = self.linear(x, f"{name}.mlp.up_proj", f"{place}.up")
        active = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{place}.sigmoid")], f"{place}.swish")
        wide = self.op("Mul", [active, up], f"{place}.wide")
        return self.op("Add", [added, self.linear(wide, f"{name}.mlp.down_proj", f"{place}.down")], output)

    def attention(self, index: int, x: str, mask: str | None) -> str:
        config, place, name = self.config, f"layers.{index}", f"model.layers.{index}.self_attn"
        counts = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
        parts = {
            part: self.heads(self.linear(x, f"{name}.{part}_proj", f"{place}.{part}"), count, f"{place}.{part}_heads")
            for part, count in counts.items()
        }
        for part in ("q", "k"):
            rotary = [parts[part], "rotary.cos", "rotary.sin", "position_ids"]
            parts[part] = self.op("RotaryEmbedding", rotary, f"{place}.{part}_rotated")
        if mask is not None:
            for part, which in (("k", "key"), ("v", "value")):
                inputs = [f"past_key_values.{index}.{which}", parts[part], "write_indices"]
                parts[part] = self.op("TensorScatter", inputs, f"present.{index}.{which}", axis=2, mode="linear")
        seen = [mask] if mask is not None else []
        causal = int(mask is None)
        mixed = self.op("Attention", [*parts.values(), *seen], f"{place}.attention", is_causal=causal)
        rows = self.op("Transpose", [mixed], f"{place}.rows", perm=[0, 2, 1, 3])
        shape = self.constant(f"{place}.rows.shape", np.array([0, 0, config.num_heads * config.head_dim], np.int64))
        return self.linear(self.op("Reshape", [rows, shape], f"{place}.joined"), f"{name}.o_proj", f"{place}.o")

    def head(self, hidden: str) -> None:
        """Logits at `last_rows` alone: [B, S, H] -> [B, H] -> [B, V]."""
        axis = self.constant("axis_1", np.array([1], np.int64))
        index = self.op("Unsqueeze", ["last_rows", axis], "last_rows.column")
        last = self.op("GatherND", [hidden, index], "final.last", batch_dims=1)
        normed = self.norm(last, "model.norm.weight", "final.norm")
        product = self.op("MatMul", [normed, self.weight(self.config.head_source, True, self.labels)], "logits.half")
        self.op("Cast", [product], "logits", to=TensorProto.FLOAT)
