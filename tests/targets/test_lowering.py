"""What the engine's graph looks like, that it follows the canonical graphs, and what it refuses."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporter.core.canonical import CanonicalModel, RotaryTable, Slice
from exporter.core.errors import UnsupportedError
from exporter.core.number_formats import decode_table
from exporter.core.recipe import CHANNEL, TENSOR, Precision, Recipe
from targets.base import BuildSource
from targets.onnxruntime.slice_session import SliceSession
from tests.targets.engines import RECIPES, Engine, build, build_source, random_ids, relative_l2


def graph_of(engine: Engine) -> onnx.GraphProto:
    return onnx.load(str(engine.path / "model.onnx"), load_external_data=False).graph


def operators(engine: Engine) -> Counter[str]:
    return Counter(node.op_type for node in graph_of(engine).node if not node.name.startswith("step."))


@pytest.mark.parametrize("shape", ["gqa", "mqa_three_layers"])
def test_each_layer_is_ten_nodes(engine, shape):
    built = engine(shape, "int4")
    layers = built.config.num_layers
    found = operators(built)
    assert found["GroupQueryAttention"] == layers
    assert found["MatMulNBits"] == 5 * layers + 1
    # The first norm follows the embedding and the last one the chosen rows; all others take their residual in.
    assert found["SkipSimplifiedLayerNormalization"] == 2 * layers - 1
    assert found["SimplifiedLayerNormalization"] == 2
    assert found["QuickGelu"] == found["Mul"] == layers
    assert found["GatherBlockQuantized"] == found["Add"] == 1
    for absent in ("Split", "Transpose", "DequantizeLinear", "MatMul", "Attention", "TensorScatter"):
        assert absent not in found


def test_nodes_have_names_that_people_can_read(engine):
    names = [node.name for node in graph_of(engine("gqa", "int4")).node]
    assert len(names) == len(set(names))
    for name in ("embed_tokens", "layers.1.self_attn.attention", "layers.0.mlp.gate_proj", "norm", "lm_head"):
        assert name in names


def test_inputs_and_outputs_are_those_of_the_signature(engine):
    built = engine("gqa", "int4")
    graph = graph_of(built)
    for values, part in ((graph.input, "inputs"), (graph.output, "outputs")):
        assert {value.name for value in values} == set(built.result.signature[part])
    logits = next(value for value in graph.output if value.name == "logits")
    assert logits.type.tensor_type.shape.dim[1].dim_value == 1


def external(graph: onnx.GraphProto) -> dict[str, dict[str, str]]:
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.external_data
    }


@pytest.mark.parametrize(
    ("recipe", "table", "head"),
    [
        ("fp32", "embed_tokens.weight", "lm_head.weight"),
        ("bf16", "embed_tokens.weight", "lm_head.weight"),
        ("int4", "embed_tokens.weight.rows", "embed_tokens.weight.codes"),
        ("int4-asym", "embed_tokens.weight.rows", "embed_tokens.weight.codes"),
    ],
)
def test_a_tied_head_shares_the_bytes_of_its_table(engine, recipe, table, head):
    built = engine("tied", recipe)
    stored = external(graph_of(built))
    assert stored[table] == stored[head]
    elements = built.config.vocab_size * built.config.hidden_size
    assert int(stored[table]["length"]) == elements * RECIPES[recipe].linear.bits // 8
    assert sum(entry["offset"] == stored[table]["offset"] for entry in stored.values()) == 2


def test_untied_or_mixed_heads_have_their_own(engine):
    mixed, untied = external(graph_of(engine("tied", "mixed"))), external(graph_of(engine("gqa", "int4")))
    assert "lm_head.weight" in mixed
    assert "embed_tokens.weight.rows" in mixed
    assert untied["embed_tokens.weight.rows"]["offset"] != untied["lm_head.weight.codes"]["offset"]


def test_the_model_file_holds_no_weights(engine):
    built = engine("gqa", "fp32")
    assert (built.path / "model.onnx").stat().st_size < 40_000
    assert all(entry["location"] == "model.onnx.data" for entry in external(graph_of(built)).values())
    assert all(int(entry["offset"]) % 4096 == 0 for entry in external(graph_of(built)).values())


Damage = Callable[[ir.Model], None]


def node_of(structure: ir.Model, kind: str, index: int = 0) -> ir.Node:
    return [node for node in structure.graph if node.op_type == kind][index]


def damaged(model: CanonicalModel, layer: int, damage: Damage) -> CanonicalModel:
    part = model.layers[layer]
    structure = part.structure.clone()
    damage(structure)
    layers = list(model.layers)
    layers[layer] = Slice(part.kind, part.index, structure, part.weights)
    return CanonicalModel(model.embedding, layers, model.head)


def set_attribute(kind: str, name: str, value: int | float, index: int = 0) -> Damage:
    def damage(structure: ir.Model) -> None:
        node_of(structure, kind, index).attributes[name] = ir.convenience.convert_attribute(name, value)

    return damage


def swap_gate_and_up(structure: ir.Model) -> None:
    swish, mul = node_of(structure, "Swish"), node_of(structure, "Mul")
    gate, up = node_of(structure, "Split", 1).outputs
    swish.replace_input_with(0, up)
    mul.replace_input_with(1, gate)


def drop_residual(structure: ir.Model) -> None:
    last = structure.graph.outputs[0].producer()
    last.replace_input_with(0, last.inputs[1])


def interleave(structure: ir.Model) -> None:
    for index in (0, 1):
        set_attribute("RotaryEmbedding", "interleaved", 1, index)(structure)


FAULTS: dict[str, Damage] = {
    "epsilon": set_attribute("RMSNormalization", "epsilon", 1e-1),
    "second epsilon": set_attribute("RMSNormalization", "epsilon", 1e-1, 1),
    "attention scale": set_attribute("Attention", "scale", 0.5),
    "not causal": set_attribute("Attention", "is_causal", 0),
    "interleaved rotation": interleave,
    "swapped gate and up": swap_gate_and_up,
    "swish alpha": set_attribute("Swish", "alpha", 1.7),
    "lost residual": drop_residual,
}


def chain(model: CanonicalModel, engine: Engine, ids: np.ndarray) -> np.ndarray:
    """Logits [V] at the last of ids [1, S] by the canonical slices themselves, on ONNX Runtime without optimizer."""
    config, source, length = engine.config, engine.source, ids.shape[1]
    cache = np.zeros((1, config.num_kv_heads, length, config.head_dim), np.float32)
    step = {
        "position_ids": np.arange(length)[None],
        "write_indices": np.zeros(1, np.int64),
        "nonpad_kv_seqlen": np.array([length]),
        "past_key": cache,
        "past_value": cache,
    }
    hidden = ids
    for part in model.slices:
        feeds = {"input_ids": ids} if part.kind == "embedding" else {"hidden": hidden}
        feeds |= step if part.kind == "layer" else {}
        feeds |= {"rows": np.array([length - 1])} if part.kind == "head" else {}
        for name, weight in part.weights.items():
            if hasattr(weight, "values"):
                feeds[name] = weight.values()
            else:
                shape = [source.checkpoint.tensors[tensor].shape[0] for tensor in weight.sources]
                feeds[name] = np.asarray(source.rows(weight, 0, sum(shape)))
        session = SliceSession(part.structure, threads=1)
        hidden = session.run(feeds)[session.output_names[0]]
    return hidden[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_layer_shows_in_the_engine(engine, tmp_path, fault):
    """The engine computes what the canonical graph says, faults included: it is lowered from the graph."""
    sound = engine("mqa_three_layers", "fp32")
    model = damaged(sound.source.model, 1, FAULTS[fault])
    broken = build(sound.source, tmp_path, model)
    ids = random_ids(sound.config, 1, 9)
    with broken.runner() as runner:
        logits = runner.prefill(ids, np.array([9]))[0]
    want = chain(model, sound, ids)
    assert relative_l2(want, chain(sound.source.model, sound, ids)) > 1e-3
    assert relative_l2(logits, want) <= 2e-5


def test_a_wrong_rotary_table_in_one_layer_shows_in_the_engine(engine, tmp_path):
    """Layers share equal tables; one that differs is stored and used on its own."""
    sound = engine("mqa_three_layers", "fp32")
    layers = list(sound.source.model.layers)
    tables = {
        name: replace(weight, inverse_frequencies=weight.inverse_frequencies[::-1])
        for name, weight in layers[1].weights.items()
        if isinstance(weight, RotaryTable)
    }
    layers[1] = Slice("layer", 1, layers[1].structure, {**layers[1].weights, **tables})
    model = CanonicalModel(sound.source.model.embedding, layers, sound.source.model.head)
    broken = build(sound.source, tmp_path, model)
    ids = random_ids(sound.config, 1, 9)
    with broken.runner() as runner:
        logits = runner.prefill(ids, np.array([9]))[0]
    want = chain(model, sound, ids)
    assert relative_l2(want, chain(sound.source.model, sound, ids)) > 1e-3
    assert relative_l2(logits, want) <= 2e-5


def wrong_axis(structure: ir.Model) -> None:
    node_of(structure, "Split").attributes["axis"] = ir.AttrInt64("axis", 1)


def unknown_operator(structure: ir.Model) -> None:
    node_of(structure, "Swish").op_type = "Elu"


def other_past(structure: ir.Model) -> None:
    node_of(structure, "TensorScatter", 1).replace_input_with(0, node_of(structure, "TensorScatter", 0).inputs[0])


def no_rotation_of_keys(structure: ir.Model) -> None:
    rotary = node_of(structure, "RotaryEmbedding", 1)
    node_of(structure, "TensorScatter").replace_input_with(1, rotary.inputs[0])


REFUSED: dict[str, tuple[Damage, str]] = {
    "unknown operator": (unknown_operator, "Elu"),
    "split along another axis": (wrong_axis, "axis 1"),
    "scatter along another axis": (set_attribute("TensorScatter", "axis", 1), "axis 1"),
    "values in the cache of keys": (other_past, "past_key stands for past_value"),
    "keys without rotation": (no_rotation_of_keys, "expected RotaryEmbedding"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_lowered_is_refused_by_name(engine, tmp_path, name):
    damage, word = REFUSED[name]
    sound = engine("mqa_three_layers", "fp32")
    with pytest.raises(UnsupportedError) as error:
        build(sound.source, tmp_path, damaged(sound.source.model, 1, damage))
    assert error.value.kind == "onnxruntime.lowering"
    assert "layer 1" in error.value.message
    assert word in error.value.message


@pytest.mark.parametrize("recipe", ["int4", "int4-asym"])
def test_scales_of_another_weight_are_refused(tiny_checkpoint, tmp_path, recipe):
    def damage(structure: ir.Model) -> None:
        first, second = (node_of(structure, "DequantizeLinear", index) for index in (0, 1))
        second.replace_input_with(1, first.inputs[1])

    source = build_source(tiny_checkpoint("gqa"), RECIPES[recipe])
    with pytest.raises(UnsupportedError, match="another weight"):
        build(source, tmp_path, damaged(source.model, 0, damage))


def coded_source(checkpoint: Path, *precision: object, activations: str = "") -> BuildSource:
    chosen = Precision(*precision, activations=activations)  # type: ignore[arg-type]
    return build_source(checkpoint, Recipe("coded", chosen, Precision("fp32"), Precision("fp32")))


@pytest.mark.parametrize(
    ("attribute", "kind", "word"),
    [("saturate", "QuantizeLinear", "Abs"), ("axis", "DequantizeLinear", "Abs"), ("keepdims", "ReduceMax", "Abs")],
)
def test_a_rounding_that_is_none_of_ours_is_refused(tiny_checkpoint, tmp_path, attribute, kind, word):
    """Only the group that exporter.core.rounded_input describes is taken; the first of its nodes is named else."""

    def damage(structure: ir.Model) -> None:
        rounding = next(node for node in structure.graph if node.op_type == "Abs")
        first = list(structure.graph).index(rounding)
        node = next(node for node in list(structure.graph)[first:] if node.op_type == kind)
        node.attributes[attribute] = ir.AttrInt64(attribute, 0)

    source = coded_source(tiny_checkpoint("gqa"), "fp8", CHANNEL, activations="fp8/token")
    with pytest.raises(UnsupportedError, match=word):
        build(source, tmp_path, damaged(source.model, 0, damage))


def test_scales_of_another_table_weight_are_refused(tiny_checkpoint, tmp_path):
    def damage(structure: ir.Model) -> None:
        scales = [value for value in structure.graph.inputs if value.name.endswith(".scales")]
        for user, index in list(scales[0].uses()):
            user.replace_input_with(index, scales[1])

    source = coded_source(tiny_checkpoint("gqa"), "nf4", 32)
    with pytest.raises(UnsupportedError, match="multiplied by scales"):
        build(source, tmp_path, damaged(source.model, 0, damage))


def test_a_table_of_another_kind_is_refused(tiny_checkpoint, tmp_path):
    """The graph looks nf4's codes up among E2M1's values."""

    def damage(structure: ir.Model) -> None:
        for node in structure.graph:
            if node.op_type == "Gather":
                values = decode_table("mxfp4")
                node.inputs[0].const_value = ir.tensor(values, name=node.inputs[0].name)

    source = coded_source(tiny_checkpoint("gqa"), "nf4", 32)
    with pytest.raises(UnsupportedError, match="looked up in e2m1"):
        build(source, tmp_path, damaged(source.model, 0, damage))


def test_rounded_inputs_cost_no_nodes_before_matmul_nbits(tiny_checkpoint, tmp_path):
    """It rounds by itself: the graph is that of the weights alone, but for their names."""
    plain = build(coded_source(tiny_checkpoint("gqa"), "int8", CHANNEL), tmp_path / "plain")
    found = operators(plain)
    for activations in ("int8/token", "int8/tensor"):
        source = coded_source(tiny_checkpoint("gqa"), "int8", CHANNEL, activations=activations)
        assert "QuantizeLinear" in {node.op_type for node in source.model.layers[0].structure.graph}
        assert operators(build(source, tmp_path / activations)) == found


def test_fp8_inputs_are_rounded_once_for_products_that_share_them(tiny_checkpoint, tmp_path):
    """qkv, o, gate with up, and down: four roundings a layer."""
    found = operators(build(coded_source(tiny_checkpoint("gqa"), "fp8", TENSOR, activations="fp8/tensor"), tmp_path))
    assert found["QuantizeLinear"] == 2 * 4
    # One more for each matrix: gate and up are apart.
    assert found["DequantizeLinear"] == 2 * (4 + 5)
