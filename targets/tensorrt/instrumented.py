"""An engine that shows its hidden states, built from an artifact's own graph: for parity on a GPU."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.core.errors import ArtifactError
from targets.tensorrt.builder import build_plan
from targets.tensorrt.devices import BuildDevice
from targets.tensorrt.engine_index import EngineIndex
from targets.tensorrt.file_names import DATA, MODEL, PLAN
from targets.tensorrt.plan_report import EngineRequest
from targets.tensorrt.toolkit import RTX

if TYPE_CHECKING:
    import onnx


def instrumented_plan(engine_dir: Path, index: EngineIndex) -> bytes:
    """The plan of the same graph, profiles and flags with the residual stream [B, S, H] as float32 outputs."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / DATA).symlink_to((engine_dir / DATA).resolve())
        with_hidden_states(engine_dir / MODEL, index, out / MODEL)
        rebuild_plan(out / MODEL, index, out / PLAN)
        return (out / PLAN).read_bytes()


def rebuild_plan(model: Path, index: EngineIndex, out: Path) -> None:
    """Build a graph as an engine was built: by the same toolkit, for the same GPUs, with the same profiles."""
    rtx = index.toolkit == RTX
    portable = rtx and index.hardware_compatible
    device = BuildDevice(index.toolkit, index.compute_capabilities, current=not rtx, portable=portable)
    request = EngineRequest(device, index.profiles, index.version_compatible, index.hardware_compatible)
    build_plan(model, request, out, lambda fraction, phase: None)


def with_hidden_states(model: Path, index: EngineIndex, out: Path) -> None:
    """Write the graph again, without its weights, with the hidden states as outputs `layers.N.hidden` of type float32.

    Where they are of another type, the value in the graph takes another name and a Cast makes the output.
    """
    import onnx

    proto = onnx.load(str(model), load_external_data=False)
    show_hidden_states(proto, index.hidden_names)
    onnx.save(proto, str(out))


def show_hidden_states(proto: "onnx.ModelProto", names: list[str]) -> None:
    """Make outputs of values inside a graph, in place. Raises ArtifactError where the graph has no such value."""
    from onnx import TensorProto, helper

    made = {output for node in proto.graph.node for output in node.output}
    if missing := [name for name in names if name not in made]:
        raise ArtifactError(
            "tensorrt.graph", f"{MODEL} has no value {missing[0]}: its layers cannot be told apart", "build it again"
        )
    inner = {name: f"{name}.inner" for name in names}
    for node in proto.graph.node:
        node.input[:] = [inner.get(name, name) for name in node.input]
        node.output[:] = [inner.get(name, name) for name in node.output]
    for info in proto.graph.value_info:
        info.name = inner.get(info.name, info.name)
    for name in names:
        proto.graph.node.append(
            helper.make_node("Cast", [inner[name]], [name], name=f"{name}.shown", to=TensorProto.FLOAT)
        )
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
