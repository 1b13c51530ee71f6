"""The protobuf walker against the onnx package, on every place where a tensor can hide."""

import random

import onnx
import pytest
from onnx import TensorProto, helper

from exporter.artifact import external_data as module
from exporter.artifact.external_data import external_data
from exporter.core.errors import ArtifactError
from tests.artifact.sample import external_tensor, onnx_model


def locations(model: bytes) -> list[str]:
    return sorted(value for found in external_data(model) for value in found.values("location"))


def subgraph(*tensors: onnx.TensorProto) -> onnx.GraphProto:
    return helper.make_graph([], "sub", [], [], initializer=list(tensors))


def test_initializers() -> None:
    assert locations(onnx_model(external_tensor("a"), external_tensor("b", "v", offset="1", checksum="x"))) == [
        "a",
        "b",
    ]
    assert locations(onnx_model(helper.make_tensor("w", TensorProto.FLOAT, [4], [0.0] * 4))) == []


def test_attributes_subgraphs_functions_sparse_tensors_and_training() -> None:
    constant = helper.make_node("Constant", [], ["w"], value=external_tensor("attribute"))
    several = helper.make_node("X", [], ["a"], domain="d")
    several.attribute.add(name="ts", type=onnx.AttributeProto.TENSORS).tensors.append(external_tensor("tensors"))
    several.attribute.add(name="gs", type=onnx.AttributeProto.GRAPHS).graphs.append(subgraph(external_tensor("graphs")))
    sparse = onnx.SparseTensorProto(values=external_tensor("values"), indices=external_tensor("indices"))
    several.attribute.add(name="s", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor.CopyFrom(sparse)
    inner = helper.make_node("If", ["c"], ["y"], then_branch=subgraph(external_tensor("deep")))
    branch = helper.make_node("If", ["c"], ["y"], then_branch=helper.make_graph([inner], "s", [], []))
    model = onnx.ModelProto.FromString(onnx_model(nodes=[constant, several, branch]))
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=external_tensor("sparse")))
    function = helper.make_function("d", "F", [], ["w"], [constant], [])
    function.node[0].attribute[0].t.CopyFrom(external_tensor("function"))
    model.functions.append(function)
    model.training_info.add().initialization.CopyFrom(subgraph(external_tensor("training")))
    assert locations(model.SerializeToString()) == [
        "attribute", "deep", "function", "graphs", "indices", "sparse", "tensors", "training", "values",
    ]  # fmt: skip


def field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2]) + encode(len(payload)) + payload


def encode(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def test_an_entry_that_repeats_its_fields_means_the_last_one_as_in_protobuf() -> None:
    entry = field(1, b"x") + field(2, b"safe") + field(1, b"location") + field(2, b"../evil")
    model = field(7, field(5, field(13, entry)))
    parsed = onnx.ModelProto.FromString(model).graph.initializer[0].external_data[0]
    assert (parsed.key, parsed.value) == ("location", "../evil")
    assert locations(model) == ["../evil"]


def test_a_graph_in_two_parts_is_read_in_both() -> None:
    parts = [field(7, field(5, field(13, field(1, b"location") + field(2, name)))) for name in (b"a", b"b")]
    assert len(onnx.ModelProto.FromString(b"".join(parts)).graph.initializer) == 2
    assert locations(b"".join(parts)) == ["a", "b"]


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"\x80" * 20,
        field(7, b"\x0a\x7f"),
        b"\x3b",
        b"\x3c",
        b"\x02\x00",
        b"\x39\x00",
        b"\x3d\x00",
        field(7, field(5, field(13, field(2, b"\xff")))),
    ],
    ids=range(9),
)
def test_malformed_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError) as caught:
        locations(data)
    assert caught.value.kind == "artifact.external_data"


def test_deep_nesting_is_refused() -> None:
    payload = b""
    for _ in range(200):
        payload = field(1, field(5, field(6, payload)))
    with pytest.raises(ArtifactError, match="nested"):
        locations(field(7, payload))


def test_endless_fields_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FIELDS", 1000)
    with pytest.raises(ArtifactError, match="fields"):
        locations(b"\x08\x01" * 2000)


def test_random_bytes_never_give_another_error() -> None:
    dice = random.Random(0)
    for _ in range(3000):
        try:
            locations(dice.randbytes(dice.randrange(60)))
        except ArtifactError as error:
            assert error.kind == "artifact.external_data"
