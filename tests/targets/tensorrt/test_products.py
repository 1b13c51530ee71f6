"""Every product of an engine, by itself: what the graph makes of its input is the recipe's formula in float64."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from exporter.core.canonical import CheckpointWeight
from exporter.core.recipe import CHANNEL, TENSOR, Precision
from exporter.core.weights import QuantizedRows
from targets.tensorrt.cpu_form import cpu_form
from targets.tensorrt.formats import rounds_inputs
from targets.tensorrt.served_rows import served_rows
from tests.support.tiny import write_checkpoint
from tests.targets.engines import INPUT_SCALE, random_ids
from tests.targets.tensorrt.typed_engines import Typed, recipe_of, typed

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
SOURCES = {
    "layers.0.self_attn.qkv_proj": [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"],
    "layers.0.self_attn.o_proj": ["model.layers.0.self_attn.o_proj.weight"],
    "layers.0.mlp.gate_up_proj": [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")],
    "layers.0.mlp.down_proj": ["model.layers.0.mlp.down_proj.weight"],
    "lm_head": ["lm_head.weight"],
}
BEHIND = ("times_token_scale", "times_power_of_two", "times_row_factors")
PRECISIONS = [
    *(Precision("fp8", group, activations=f"fp8/{way}") for group in (CHANNEL, TENSOR) for way in ("token", "tensor")),
    *(Precision("int8", CHANNEL, activations=f"int8/{way}") for way in ("token", "tensor")),
    Precision("nvfp4", 16, activations="nvfp4/tensor"),
    *(Precision("nvfp4", 16), Precision("fp8", TENSOR), Precision("int8", CHANNEL), Precision("int8", 32)),
    *(Precision("int4", 32), Precision("int4", CHANNEL), Precision("int6", 64)),
]
# float32 sums of 512 products in another order; a decoded weight and an input in fp16 err by 2^-11 each.
EXACT, HALF = 1e-6, 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), **WIDE)


@pytest.mark.parametrize("precision", PRECISIONS, ids=Precision.describe)
def test_products_are_those_of_the_recipe(checkpoint, tmp_path, precision):
    engine = typed(checkpoint, recipe_of(precision, head=precision), tmp_path)
    limit = EXACT if rounds_inputs(precision) else HALF
    for name, (x, y) in inner_products(engine).items():
        want = rounded(x.astype(np.float64), precision) @ weights(engine, name, precision).T
        assert np.linalg.norm(y - want) <= limit * np.linalg.norm(want), name


def inner_products(engine: Typed) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What each product takes, [R, K], before any rounding, and what it leads to, [R, N]."""
    proto = onnx.load(str(engine.model.path))
    nodes = {node.name: node for node in proto.graph.node}
    made_by = {output: node for node in proto.graph.node for output in node.output}
    ends = {name: (_taken(nodes, made_by, name), _led_to(nodes, name)) for name in SOURCES}
    shown = dict.fromkeys(value for pair in ends.values() for value in pair if value != "logits")
    cpu_form(proto)
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(value) for value in shown)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # ONNX Runtime would make integer products of Q/DQ around FP8 too, which it has none of.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = dict(zip((o.name for o in session.get_outputs()), session.run(None, _feeds(engine)), strict=True))
    return {name: tuple(values[v].reshape(-1, values[v].shape[-1]) for v in pair) for name, pair in ends.items()}


def _taken(nodes, made_by, name):
    """The value that the recipe rounds, or that the product takes, whichever is first."""
    for step in ("magnitudes", "quantize"):
        if found := nodes.get(f"{name}.input.{step}"):
            return found.input[0]
    value = nodes[name].input[0]
    producer = made_by.get(value)
    return producer.input[0] if producer is not None and producer.op_type == "Cast" else value


def _led_to(nodes, name):
    for step in BEHIND:
        if found := nodes.get(f"{name}.{step}"):
            return found.output[0]
    return (nodes.get(f"{name}.to_float") or nodes[name]).output[0]


def _feeds(engine: Typed):
    config, ids = engine.source.config, random_ids(engine.source.config, 2, 7)
    cache = np.zeros((2, config.num_kv_heads, 48, config.head_dim), np.float16)
    caches = {name: cache for name in engine.model.inputs if name.startswith("past_key_values")}
    positions = np.tile(np.arange(7), (2, 1))
    step = {"input_ids": ids, "position_ids": positions, "write_indices": np.zeros(2, np.int64)}
    return {**step, "last_rows": np.array([6, 3]), **caches}


def weights(engine: Typed, name: str, precision: Precision) -> np.ndarray:
    """float64 [N, K]: codes times scales."""
    source = engine.source
    parts = []
    for tensor in SOURCES[name]:
        count = source.checkpoint.tensors[tensor].shape[0]
        rows = served_rows(source.rows)(CheckpointWeight((tensor,), precision), 0, count)
        assert isinstance(rows, QuantizedRows)
        parts.append(rows.dequantize().astype(np.float64))
    return np.concatenate(parts)


def rounded(x: np.ndarray, precision: Precision) -> np.ndarray:
    """x [R, K] as the recipe rounds it, from its definition; quotients are float32 ones, which decide between codes."""
    if not rounds_inputs(precision):
        return x
    kind, _, way = precision.activations.partition("/")
    if kind == "nvfp4":
        return _blocks(x)
    top = {"int8": 127.0, "fp8": 448.0}[kind]
    scale = np.float32(INPUT_SCALE) if way == "tensor" else (np.abs(x).max(-1, keepdims=True) / top).astype(np.float32)
    quotient = x.astype(np.float32) / scale
    codes = np.clip(np.rint(quotient), -128, 127) if kind == "int8" else _e4m3(quotient)
    return codes.astype(np.float64) * scale.astype(np.float64)


def _e4m3(x: np.ndarray) -> np.ndarray:
    """To the nearest of 2^e * (1 + m / 8), e from -6, halves to even; 448 is the largest (OCP FP8, section 5)."""
    exponent = np.maximum(np.frexp(np.abs(x))[1] - 1, -6)
    step = np.ldexp(1.0, exponent - 3)
    return np.clip(np.rint(x.astype(np.float64) / step) * step, -448, 448)


def _blocks(x: np.ndarray) -> np.ndarray:
    blocks, total = x.astype(np.float32).reshape(len(x), -1, 16), np.float32(INPUT_SCALE)
    scale = _e4m3(np.abs(blocks).max(-1, keepdims=True) / np.float32(6) / total).astype(np.float32) * total
    divided = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    exponent = np.maximum(np.frexp(np.abs(divided))[1] - 1, 0)
    step = np.ldexp(0.5, exponent)
    return (np.clip(np.rint(divided / step) * step, -6, 6) * scale).reshape(x.shape).astype(np.float64)


def test_tokens_of_zeros_stay_zero(checkpoint, tmp_path):
    """Nothing is divided by nothing: the embedding of a token is zero, and so is all that follows of it in float32."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = write_checkpoint(tmp_path / "checkpoint", **WIDE)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = torch.zeros(256)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    engine = typed(folder, recipe_of(Precision("fp8", CHANNEL, activations="fp8/token")), tmp_path / "engine")
    with engine.runner() as runner:
        assert np.array_equal(runner.prefill(np.array([[7, 7]]), np.array([2])), np.zeros((1, 320), np.float32))


@pytest.mark.parametrize("gain", [2.0**-20, 2.0**12])
@pytest.mark.parametrize(
    "precision",
    [Precision("int4", 32), Precision("int8", CHANNEL), Precision("fp8", CHANNEL), Precision("int8", 64)],
    ids=Precision.describe,
)
def test_half_precision_loses_no_matrix_that_is_far_from_one(tmp_path, precision, gain):
    """Weights of 1e-8 would vanish in fp16, scales of such first: a power of two stands apart."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", gain=gain, **WIDE)
    engine = typed(checkpoint, recipe_of(precision), tmp_path / "engine")
    name = "layers.0.self_attn.qkv_proj"
    x, y = inner_products(engine)[name]
    want = x.astype(np.float64) @ weights(engine, name, precision).T
    assert np.linalg.norm(y - want) <= HALF * np.linalg.norm(want)
