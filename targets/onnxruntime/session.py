"""How engines are opened: session options, threads, and errors in words."""

from pathlib import Path
from typing import TYPE_CHECKING

from exporter.core.errors import ArtifactError, UnsupportedError
from exporter.core.machine import physical_cores
from targets.onnxruntime.file_names import DATA
from targets.onnxruntime.mapped_pages import drop_mapped_pages

if TYPE_CHECKING:
    import onnxruntime as ort

ERRORS_ONLY = 3


def open_session(path: Path, threads: int, hidden: list[str] | None = None) -> "ort.InferenceSession":
    """An engine, ready to run. `hidden` names values that become outputs as well.

    Raises UnsupportedError when ONNX Runtime is missing, ArtifactError when it cannot load the engine.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UnsupportedError(
            "onnxruntime.missing", f"ONNX Runtime cannot be imported: {error}", "pip install 'enginesmith[onnxruntime]'"
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    model: str | bytes = str(path)
    if hidden:
        model = _with_outputs(path, hidden)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no common class below Exception
        raise ArtifactError(
            "onnxruntime.load",
            f"ONNX Runtime {ort.__version__} cannot load {path.name}: {str(error).splitlines()[0]}",
            "build the engine again, or install the ONNX Runtime it was built for (enginesmith inspect shows it)",
        ) from error
    drop_mapped_pages(path.with_name(DATA).resolve())
    return session


def _with_outputs(path: Path, names: list[str]) -> bytes:
    """The model with further outputs. It holds no weights, so a copy in memory is small."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    serialized: bytes = model.SerializeToString()
    return serialized
