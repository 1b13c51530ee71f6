"""The canonical model written by hand: what tracing and fusing must arrive at, and what other rooms are tested with."""

import onnx_ir as ir

from exporter.core.canonical import OPSET, CanonicalModel, CheckpointWeight, RotaryTable, Slice, Weight
from exporter.core.config import ModelConfig

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


class _Graph:
    """A graph under construction: activations and weights as inputs, nodes appended in order."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.activations: list[ir.Value] = []
        self.weights: list[ir.Value] = []
        self.constants: list[ir.Value] = []

    def input(self, name: str, shape: list[int | str], dtype: ir.DataType = FLOAT) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.activations.append(value)
        return value

    def weight(self, name: str, shape: list[int | str]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(FLOAT))
        self.weights.append(value)
        return value

    def constant(self, name: str, data: list[int]) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(data, dtype=INT64, name=name))
        value.shape, value.dtype = ir.Shape([len(data)]), INT64
        self.constants.append(value)
        return value

    def op(self, kind: str, inputs: list[ir.Value | None], outputs: int = 1, **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes, num_outputs=outputs)
        self.nodes.append(node)
        return node.outputs[0]

    def model(self, outputs: dict[str, ir.Value]) -> ir.Model:
        for name, value in outputs.items():
            value.name, value.type = name, ir.TensorType(FLOAT)
        graph = ir.Graph(
            [*self.activations, *self.weights],
            list(outputs.values()),
            nodes=self.nodes,
            initializers=self.constants,
            opset_imports={"": OPSET},
            name="slice",
        )
        return ir.Model(graph, ir_version=11)


def linear(graph: _Graph, x: ir.Value, name: str, shape: tuple[int, int], bias: bool) -> ir.Value:
    """x [.., K] times the transpose of a weight stored [N, K], plus a bias [N]."""
    transposed = graph.op("Transpose", [graph.weight(f"{name}.weight", list(shape))], perm=[1, 0])
    y = graph.op("MatMul", [x, transposed])
    return graph.op("Add", [y, graph.weight(f"{name}.bias", [shape[0]])]) if bias else y


def rms_norm(graph: _Graph, x: ir.Value, name: str, config: ModelConfig) -> ir.Value:
    scale = graph.weight(f"{name}.weight", [config.hidden_size])
    return graph.op("RMSNormalization", [x, scale], axis=-1, epsilon=config.rms_norm_eps)


def embedding_structure(config: ModelConfig) -> ir.Model:
    graph = _Graph()
    ids = graph.input("input_ids", ["B", "S"], INT64)
    table = graph.weight("embed_tokens.weight", ["V", config.hidden_size])
    return graph.model({"hidden": graph.op("Gather", [table, ids], axis=0)})


def layer_structure(config: ModelConfig) -> ir.Model:
    graph = _Graph()
    d, kv, q = config.head_dim, config.num_kv_heads, config.num_heads
    hidden = graph.input("hidden", ["B", "S", config.hidden_size])
    positions = graph.input("position_ids", ["B", "S"], INT64)
    write = graph.input("write_indices", ["B"], INT64)
    total = graph.input("nonpad_kv_seqlen", ["B"], INT64)
    past = [graph.input(f"past_{part}", ["B", kv, "M", d]) for part in ("key", "value")]

    x = rms_norm(graph, hidden, "input_layernorm", config)
    packed = linear(graph, x, "self_attn.qkv_proj", ((q + 2 * kv) * d, config.hidden_size), config.attention_bias)
    split = ir.node(
        "Split",
        [packed, graph.constant("qkv_widths", [q * d, kv * d, kv * d])],
        attributes={"axis": -1},
        num_outputs=3,
    )
    graph.nodes.append(split)
    heads = []
    for part, count in zip(split.outputs, (q, kv, kv), strict=True):
        shape = graph.constant(f"heads_{len(heads)}", [0, 0, count, d])
        heads.append(graph.op("Transpose", [graph.op("Reshape", [part, shape])], perm=[0, 2, 1, 3]))
    tables = [graph.weight(f"rotary.{f}_cache", ["P", d // 2]) for f in ("cos", "sin")]
    query, key = (graph.op("RotaryEmbedding", [h, *tables, positions], interleaved=0) for h in heads[:2])
    present = [
        graph.op("TensorScatter", [cache, new, write], axis=-2)
        for cache, new in zip(past, (key, heads[2]), strict=True)
    ]
    longest = graph.op("ReduceMax", [total], keepdims=1)
    bounds = [graph.constant("slice_start", [0]), longest, graph.constant("slice_axis", [2])]
    live = [graph.op("Slice", [cache, *bounds]) for cache in present]
    attended = graph.op("Attention", [query, *live, None, None, None, total], is_causal=1, scale=float(d) ** -0.5)
    merged = graph.op(
        "Reshape",
        [graph.op("Transpose", [attended], perm=[0, 2, 1, 3]), graph.constant("merged", [0, 0, q * d])],
    )
    x = linear(graph, merged, "self_attn.o_proj", (config.hidden_size, q * d), config.attention_bias)
    residual = graph.op("Add", [hidden, x])
    x = rms_norm(graph, residual, "post_attention_layernorm", config)
    wide = config.intermediate_size
    packed = linear(graph, x, "mlp.gate_up_proj", (2 * wide, config.hidden_size), config.mlp_bias)
    split = ir.node(
        "Split", [packed, graph.constant("gate_up_widths", [wide, wide])], attributes={"axis": -1}, num_outputs=2
    )
    graph.nodes.append(split)
    x = graph.op("Mul", [graph.op("Swish", [split.outputs[0]]), split.outputs[1]])
    x = linear(graph, x, "mlp.down_proj", (config.hidden_size, wide), config.mlp_bias)
    out = graph.op("Add", [residual, x])
    return graph.model({"hidden_out": out, "present_key": present[0], "present_value": present[1]})


def head_structure(config: ModelConfig) -> ir.Model:
    graph = _Graph()
    hidden = graph.input("hidden", ["B", "S", config.hidden_size])
    rows = graph.input("rows", ["R"], INT64)
    flat = graph.op("Reshape", [hidden, graph.constant("flat", [-1, config.hidden_size])])
    x = rms_norm(graph, graph.op("Gather", [flat, rows], axis=0), "norm", config)
    transposed = graph.op("Transpose", [graph.weight("lm_head.weight", ["V", config.hidden_size])], perm=[1, 0])
    return graph.model({"logits": graph.op("MatMul", [x, transposed])})


def layer_weights(config: ModelConfig, layer: int, length: int) -> dict[str, Weight]:
    prefix = f"model.layers.{layer}."
    packs = {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj": ("self_attn.o_proj",),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    }
    weights: dict[str, Weight] = {}
    for name, parts in packs.items():
        weights[f"{name}.weight"] = CheckpointWeight(tuple(f"{prefix}{p}.weight" for p in parts))
        if config.attention_bias if name.startswith("self_attn") else config.mlp_bias:
            weights[f"{name}.bias"] = CheckpointWeight(tuple(f"{prefix}{p}.bias" for p in parts))
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{name}.weight"] = CheckpointWeight((f"{prefix}{name}.weight",))
    frequencies = tuple(float(f) for f in config.rope.inverse_frequencies(config.head_dim))
    for function in ("cos", "sin"):
        weights[f"rotary.{function}_cache"] = RotaryTable(function, frequencies, length)
    return weights


def canonical_llama(config: ModelConfig, max_seq_len: int) -> CanonicalModel:
    """The whole canonical model of a config; all layers share one structure."""
    layer = layer_structure(config)
    return CanonicalModel(
        Slice(
            "embedding",
            None,
            embedding_structure(config),
            {"embed_tokens.weight": CheckpointWeight(("model.embed_tokens.weight",))},
        ),
        [Slice("layer", i, layer, layer_weights(config, i, max_seq_len)) for i in range(config.num_layers)],
        Slice(
            "head",
            None,
            head_structure(config),
            {
                "norm.weight": CheckpointWeight(("model.norm.weight",)),
                "lm_head.weight": CheckpointWeight((config.head_source,)),
            },
        ),
    )
