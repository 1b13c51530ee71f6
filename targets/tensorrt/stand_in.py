"""The engine's own graph run on this CPU, where there is no GPU for the engine itself.

What it proves: the graph that TensorRT was given computes the model, in the engine's arithmetic, with the runner's
steps. What it does not: anything that TensorRT makes of the graph.
"""

from pathlib import Path

from exporter.core.config import ModelConfig
from exporter.core.errors import ArtifactError, UnsupportedError
from targets.base import Limits, RunOptions
from targets.tensorrt.cpu_form import cpu_form
from targets.tensorrt.cpu_session import CpuExecution
from targets.tensorrt.engine_index import EngineIndex
from targets.tensorrt.executor import Executor
from targets.tensorrt.file_names import MODEL
from targets.tensorrt.instrumented import show_hidden_states
from targets.tensorrt.runner import TensorRtRunner, check_index


class StandIn(TensorRtRunner):
    """A runner on model.onnx. `changes` says what of the graph was computed otherwise than it stands."""

    def __init__(
        self,
        executor: Executor,
        index: EngineIndex,
        config: ModelConfig,
        limits: Limits,
        options: RunOptions,
        changes: tuple[str, ...],
    ) -> None:
        super().__init__(executor, index, config, limits, options)
        self.changes = changes

    @property
    def proof(self) -> str:
        """What ran, for reports."""
        return f"the engine's graph on the CPU{': ' if self.changes else ''}{'; '.join(self.changes)}"


def open_stand_in(engine_dir: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> StandIn:
    """The graph of an engine with the engine's index, caches and steps. Raises UnsupportedError where this machine
    cannot run it."""
    index = EngineIndex.read(engine_dir)
    check_index(index, config, limits)
    try:
        import onnx
    except ImportError as error:
        raise UnsupportedError(
            "onnx.missing", f"the engine's graph cannot be read: {error}", "pip install 'enginesmith[build]'"
        ) from error
    try:
        proto = onnx.load(str(engine_dir / MODEL), load_external_data=False)
    except Exception as error:  # protobuf's and the file system's
        raise ArtifactError("tensorrt.graph", f"{MODEL} cannot be read: {error}", "build the engine again") from error
    hidden = index.hidden_names if options.hidden_states else []
    show_hidden_states(proto, hidden)
    changes = cpu_form(proto)
    execution = CpuExecution(proto, engine_dir, index, options.batch, options.threads, hidden)
    return StandIn(execution, index, config, limits, options, changes)
