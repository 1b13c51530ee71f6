"""An engine's graph on ONNX Runtime's CPU kernels: targets.tensorrt.executor.Executor without a GPU."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.core.errors import ArtifactError, UnsupportedError
from exporter.core.machine import physical_cores
from targets.tensorrt.engine_index import EngineIndex
from targets.tensorrt.executor import StepResult
from targets.tensorrt.step_plan import Step

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

ERRORS_ONLY = 3
CACHE_TYPES: dict[str, type[np.generic]] = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
DECODED_ONCE = 4 << 30
"""Matrices up to so many bytes, two a weight (four in bfloat16), are decoded when the graph is opened. Those of larger
models are read from the file and decoded in every step, one after another, to save their memory."""


class CpuExecution:
    """A graph with its caches in this process. They are bound as past and present alike, as the engine's are."""

    def __init__(
        self, proto: "onnx.ModelProto", folder: Path, index: EngineIndex, batch: int, threads: int, hidden: list[str]
    ) -> None:
        self._index, self._batch, self._hidden = index, batch, hidden
        self._session: ort.InferenceSession | None = open_graph(proto, folder, threads)
        types = {value.name: value.type for value in self._session.get_inputs()}
        self._logits = np.zeros((batch, index.outputs), np.float32)
        self._caches = {
            name: np.zeros(index.cache_shape(batch), CACHE_TYPES[types[f"past_key_values.{name}"]])
            for name in index.cache_names
        }
        self._binding = self._session.io_binding()
        for name, array in self._caches.items():
            self._bind_input(f"past_key_values.{name}", array)
            self._bind_output(f"present.{name}", array)
        self._bind_output("logits", self._logits)

    def step(self, step: Step, profile: str) -> StepResult:
        """Compute a step; profiles make no difference here."""
        if self._session is None:
            raise ArtifactError("run.closed", "the engine is closed", "open it again")
        feeds = {name: np.ascontiguousarray(array) for name, array in step.feeds.items()}
        for name, array in feeds.items():
            if name != "write_indices" or self._index.has_cache:
                self._bind_input(name, array)
        shape = (self._batch, step.width, self._index.hidden_size)
        hidden = tuple(np.empty(shape, np.float32) for _ in self._hidden)
        for name, array in zip(self._hidden, hidden, strict=True):
            self._bind_output(name, array)
        self._session.run_with_iobinding(self._binding)
        return StepResult(self._logits.copy() if step.ended.any() else None, hidden)

    def close(self) -> None:
        self._session = None
        self._caches.clear()

    def _bind_input(self, name: str, array: np.ndarray) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: np.ndarray) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def open_graph(proto: "onnx.ModelProto", folder: Path, threads: int) -> "ort.InferenceSession":
    """A session on a graph in memory whose weights lie in `folder`. No operators are fused and none of quantization is
    rearranged: the graph is to be computed as it stands."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UnsupportedError(
            "onnxruntime.missing",
            f"the engine's graph is run by ONNX Runtime here, which cannot be imported: {error}",
            "pip install 'enginesmith[onnxruntime]'",
        ) from error
    try:
        return ort.InferenceSession(
            proto.SerializeToString(),
            _options(folder, threads),
            providers=["CPUExecutionProvider"],
            disabled_optimizers=[] if decoded_bytes(proto) <= DECODED_ONCE else ["ConstantFolding"],
        )
    except Exception as error:  # ONNX Runtime's own exceptions have no common class below Exception
        raise UnsupportedError(
            "tensorrt.stand_in",
            f"ONNX Runtime {ort.__version__} cannot run the engine's graph: {str(error).splitlines()[0]}",
            "verify the engine on a GPU, or build with --no-parity",
        ) from error


def decoded_bytes(proto: "onnx.ModelProto") -> int:
    """What the weights take as they are multiplied: bfloat16 ones are widened to float32 by cpu_form."""
    from onnx import TensorProto

    weights = proto.graph.initializer
    width = 4 if any(each.data_type == TensorProto.BFLOAT16 for each in weights) else 2
    return width * sum(int(math.prod(each.dims)) for each in weights)


def _options(folder: Path, threads: int) -> "ort.SessionOptions":
    """Matrices are widened to float32 where they are multiplied, and let go of at once: without an arena, and in the
    order of the graph, where ONNX Runtime's own order begins with all that depends on weights alone. Measured on 0.6
    billion weights in float16: 2.4 GB at most in place of 6.4 GB and growing."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options
