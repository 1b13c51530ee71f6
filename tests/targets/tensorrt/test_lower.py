"""The typed graph: what goes in and out, its types, and what it computes on every shape of model."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporter.core.canonical import CanonicalModel, Slice
from exporter.core.errors import UnsupportedError
from exporter.core.recipe import CHANNEL, Override, Precision
from exporter.core.task import Task
from targets.base import Limits
from targets.tensorrt.cache_length import cache_length
from targets.tensorrt.file_names import DATA, MODEL
from targets.tensorrt.signature import TensorSpec
from tests.support.canonical_llama import canonical_llama
from tests.support.tiny import SHAPES, write_checkpoint
from tests.targets.engines import build_source, eager, eager_logits, random_ids, relative_l2
from tests.targets.tensorrt.typed_engines import LIMITS, errors, recipe_of, typed, typed_source

# The contract's ceiling for half arithmetic; fp16 itself errs by 5e-4 here, bf16 by 5e-3.
HALF = {"fp16": 3e-3, "bf16": 1e-2}
FP16, BF16 = Precision("fp16"), Precision("bf16")
LABELS = Task("classify", ("safe", "unsafe"), (5, 9))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), gain=0.5)


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory):
    return typed(checkpoint, recipe_of(FP16), tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_model_is_computed(tmp_path, shape):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", shape, gain=0.5)
    assert max(errors(typed(checkpoint, recipe_of(FP16), tmp_path / "engine"))) <= HALF["fp16"]


def test_bfloat16_is_another_arithmetic(checkpoint, tmp_path):
    engine = typed(checkpoint, recipe_of(BF16, "bf16"), tmp_path)
    assert (engine.model.arithmetic, engine.model.cache_type) == ("bf16", "bf16")
    assert engine.model.inputs["past_key_values.0.key"].dtype == "bfloat16"
    assert max(errors(engine)) <= HALF["bf16"]


def test_inputs_and_outputs_are_those_of_the_contract(engine):
    cache = TensorSpec("float16", ("B", 2, 48, 16))
    tokens, rows = TensorSpec("int64", ("B", "S")), TensorSpec("int64", ("B",))
    names = [f"{layer}.{which}" for layer in range(2) for which in ("key", "value")]
    assert engine.model.inputs == {
        "input_ids": tokens, "position_ids": tokens, "write_indices": rows, "last_rows": rows,
        **{f"past_key_values.{name}": cache for name in names},
    }  # fmt: skip
    assert engine.model.outputs == {
        "logits": TensorSpec("float32", ("B", 320)),
        **{f"present.{name}": cache for name in names},
    }
    graph = onnx.load(str(engine.model.path), load_external_data=False).graph
    shown = {**engine.model.inputs, **engine.model.outputs}
    assert [value.name for value in [*graph.input, *graph.output]] == list(shown)
    for value in [*graph.input, *graph.output]:
        found = value.type.tensor_type
        shape = tuple(axis.dim_param or axis.dim_value for axis in found.shape.dim)
        assert TensorSpec(onnx.helper.tensor_dtype_to_np_dtype(found.elem_type).name, shape) == shown[value.name]


def test_the_graph_is_valid_onnx_with_readable_names(engine):
    onnx.checker.check_model(str(engine.model.path), full_check=True)
    graph = onnx.load(str(engine.model.path), load_external_data=False).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    expected = {"layers.1.self_attn.qkv_proj", "layers.0.mlp.down_proj", "layers.1.self_attn.attention", "lm_head"}
    assert expected | {"layers.0.self_attn.key_cache", "layers.1.post_attention_layernorm"} <= set(names)
    values = {name for node in graph.node for name in node.output}
    assert {"layers.0.hidden", "layers.1.hidden", "final.hidden"} <= values


def test_types_stand_where_they_should(engine):
    model = onnx.shape_inference.infer_shapes(onnx.load(str(engine.model.path)))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    made = {node.name: types.get(node.output[0]) for node in model.graph.node}
    for name in ("layers.0.self_attn.attention", "layers.0.self_attn.qkv_proj", "lm_head"):
        assert made[name] == onnx.TensorProto.FLOAT16, name
    for name in ("layers.0.input_layernorm", "layers.0.self_attn.rotary_embedding", "layers.1.residual", "norm"):
        assert made[name] == onnx.TensorProto.FLOAT, name


def test_the_same_source_gives_the_same_bytes(checkpoint, tmp_path):
    recipe = recipe_of(Precision("int4", 16))
    folders = [typed(checkpoint, recipe, tmp_path / name).model.path.parent for name in ("one", "two")]
    for name in (MODEL, DATA):
        first, second = (folder / name for folder in folders)
        assert first.read_bytes() == second.read_bytes()


def test_what_a_step_writes_is_what_the_next_one_reads(engine):
    """A prompt in chunks, a row that rests, a decode step: as one pass over each whole row."""
    ids = random_ids(engine.source.config, 2, 12)
    model = eager(engine.source)
    with engine.runner(batch=2) as runner:
        runner.prefill(ids[:, :5], np.array([5, 3]))
        runner.extend(ids[:, 5:9], np.array([4, 0]))
        logits = runner.decode(np.array([ids[0, 9], ids[1, 3]]), np.array([True, True]))
    want = [eager_logits(model, ids[0, :10])[-1], eager_logits(model, ids[1, :4])[-1]]
    assert max(map(relative_l2, logits, want)) <= HALF["fp16"]


def test_the_cache_holds_one_position_more_than_a_row_may_have():
    assert [cache_length(Limits(1, length)) for length in (7, 8, 40, 4096)] == [8, 16, 48, 4104]


def test_classifiers_have_no_cache(checkpoint, tmp_path):
    """The head's rows are chosen before this room: here it has all of them."""
    source = replace(build_source(checkpoint, recipe_of(FP16), LIMITS), task=LABELS)
    engine = typed_source(source, tmp_path)
    assert list(engine.model.inputs) == ["input_ids", "position_ids", "last_rows"]
    assert list(engine.model.outputs) == ["logits"]
    graph = onnx.load(str(engine.model.path), load_external_data=False).graph
    assert not {"TensorScatter", "LessOrEqual"} & {node.op_type for node in graph.node}
    assert [a.i for n in graph.node if n.op_type == "Attention" for a in n.attribute if a.name == "is_causal"] == [1, 1]
    ids, lengths = random_ids(source.config, 3, 9), np.array([9, 4, 1])
    with engine.runner(batch=3) as runner:
        logits = runner.prefill(ids, lengths)
    want = [eager_logits(eager(source), row[:length])[-1] for row, length in zip(ids, lengths, strict=True)]
    assert max(map(relative_l2, logits, want)) <= HALF["fp16"]


def test_one_table_serves_embedding_and_tied_head(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "tied", gain=0.5)
    engine = typed(checkpoint, recipe_of(FP16), tmp_path / "engine")
    table = 320 * 64 * 2
    assert (tmp_path / "engine" / DATA).stat().st_size < engine.model.weights_bytes + 4096 * 40
    held = engine.model.weights_bytes - sum(
        2 * np.prod(shape) for name, shape in engine.source.config.tensor_shapes.items() if len(shape) == 2
    )
    assert held < table


def test_a_cache_of_another_type_than_attention_is_refused(checkpoint, tmp_path):
    with pytest.raises(UnsupportedError, match="KV cache in bf16") as error:
        typed(checkpoint, replace(recipe_of(FP16), kv_cache="bf16"), tmp_path)
    assert "--kv-cache fp16" in (error.value.remedy or "")


def test_matrices_may_differ_in_precision(checkpoint, tmp_path):
    """Also one whose groups do not divide its width, which stays float32."""
    overrides = (Override("layers.1.mlp.*", Precision("int8", CHANNEL)), Override("layers.0.self_attn.o_proj", FP16))
    mixed = replace(recipe_of(Precision("int4", 128), head=Precision("fp8", CHANNEL)), overrides=overrides)
    assert max(errors(typed(checkpoint, mixed, tmp_path))) <= HALF["fp16"]


def change_layers(model: CanonicalModel, change) -> CanonicalModel:
    def changed(part: Slice) -> Slice:
        structure = part.structure.clone()
        change(structure.graph)
        return replace(part, structure=structure)

    return replace(model, layers=[changed(part) for part in model.layers])


def first(graph: ir.Graph, kind: str) -> ir.Node:
    return next(node for node in graph if node.op_type == kind)


def softmax_instead(graph: ir.Graph) -> None:
    first(graph, "Swish").op_type = "Softmax"


def not_causal(graph: ir.Graph) -> None:
    first(graph, "Attention").attributes["is_causal"] = ir.AttrInt64("is_causal", 0)


def circular(graph: ir.Graph) -> None:
    first(graph, "TensorScatter").attributes["mode"] = ir.AttrString("mode", "circular")


def other_positions(graph: ir.Graph) -> None:
    node = first(graph, "RotaryEmbedding")
    node.replace_input_with(3, next(value for value in graph.inputs if value.name == "write_indices"))


def crossed(graph: ir.Graph) -> None:
    first(graph, "TensorScatter").replace_input_with(0, next(v for v in graph.inputs if v.name == "hidden"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (softmax_instead, "Softmax"),
        (not_causal, "is_causal 0"),
        (circular, "circular"),
        (other_positions, "write_indices stands for position_ids"),
        (crossed, "writes into hidden"),
    ],
)
def test_graphs_that_are_not_canonical_are_refused_by_name(checkpoint, tmp_path, change, words):
    source = build_source(checkpoint, recipe_of(FP16), LIMITS)
    model = change_layers(source.model, change)
    with pytest.raises(UnsupportedError, match=words) as error:
        typed_source(replace(source, model=model), tmp_path)
    assert error.value.kind == "tensorrt.lowering" and "layer 0" in error.value.message


def test_the_hand_written_model_stays_untouched(checkpoint, tmp_path):
    """Structures are shared between layers: lowering writes into none of them."""
    source = build_source(checkpoint, recipe_of(FP16), LIMITS)
    before = [ir.to_proto(part.structure).SerializeToString(deterministic=True) for part in source.model.slices]
    typed_source(source, tmp_path)
    after = [ir.to_proto(part.structure).SerializeToString(deterministic=True) for part in source.model.slices]
    assert before == after
    assert len(canonical_llama(source.config, 40).slices) == len(before)
