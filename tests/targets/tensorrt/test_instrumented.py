"""Engines that show their hidden states, built from an artifact's graph by the toolkit that is here: it runs none."""

import onnx
import pytest

from exporter.core.errors import UnsupportedError
from targets.tensorrt.file_names import MODEL
from targets.tensorrt.instrumented import instrumented_plan, with_hidden_states
from tests.targets.tensorrt.contract_engines import ContractEngine, contract_engine


@pytest.fixture(scope="module")
def engine(tiny_checkpoint, tmp_path_factory) -> ContractEngine:
    """RTX takes heads of 16 elements and more."""
    return contract_engine(tiny_checkpoint("gqa"), tmp_path_factory.mktemp("engine"))


def test_the_graph_shows_every_boundary_in_float32(engine, tmp_path):
    with_hidden_states(engine.folder / MODEL, engine.index, tmp_path / MODEL)
    plain, shown = (onnx.load(str(folder / MODEL), load_external_data=False) for folder in (engine.folder, tmp_path))
    added = shown.graph.output[len(plain.graph.output) :]
    assert [value.name for value in added] == engine.index.hidden_names
    assert {value.type.tensor_type.elem_type for value in added} == {onnx.TensorProto.FLOAT}
    assert len(shown.graph.node) == len(plain.graph.node) + len(added)
    assert [each.external_data for each in shown.graph.initializer] == [
        each.external_data for each in plain.graph.initializer
    ]


def test_rtx_builds_it_from_the_artifact_alone(engine, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    before = sorted(path.name for path in engine.folder.iterdir())
    plan = instrumented_plan(engine.folder, engine.index)
    assert len(plan) > 10_000
    assert sorted(path.name for path in engine.folder.iterdir()) == before


def test_what_the_builder_refuses_is_named(engine, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    proto = onnx.load(str(engine.folder / MODEL))
    attention = next(node for node in proto.graph.node if node.op_type == "Attention")
    attention.attribute.append(onnx.helper.make_attribute("softcap", 30.0))
    onnx.save(proto, str(tmp_path / MODEL))
    (tmp_path / "model.onnx.data").touch()
    with pytest.raises(UnsupportedError, match=r"layers\.0\.attention"):
        instrumented_plan(tmp_path, engine.index)
