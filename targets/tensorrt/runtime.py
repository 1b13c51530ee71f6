"""TensorRT's own runtime, whichever of its two flavours built an engine: loaded, deserialized, asked for contexts."""

import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.core.errors import ArtifactError
from targets.tensorrt.engine_index import EngineIndex
from targets.tensorrt.file_names import PLAN


@dataclass
class LoadedEngine:
    """An ICudaEngine with what has to live as long as it does. `messages`: errors that the runtime reported."""

    trt: Any
    index: EngineIndex
    messages: list[str] = field(default_factory=list)
    engine: Any = None
    _kept: list[Any] = field(default_factory=list)

    @staticmethod
    def load(trt: Any, index: EngineIndex, plan: Path | bytes) -> "LoadedEngine":
        """Deserialize a plan, mapped rather than read. Raises ArtifactError when the runtime refuses it.

        Code of the host is run from version-compatible engines alone, which cannot do without
        (IRuntime::setEngineHostCodeAllowed).
        """
        loaded = LoadedEngine(trt, index)
        logger = _collecting_logger(trt, loaded.messages)
        runtime = trt.Runtime(logger)
        runtime.engine_host_code_allowed = index.version_compatible
        loaded._kept += [logger, runtime]
        if isinstance(plan, bytes):
            loaded.engine = runtime.deserialize_cuda_engine(plan)
        else:
            with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                loaded.engine = runtime.deserialize_cuda_engine(data)
        if loaded.engine is None:
            raise loaded.refused(f"{trt.__name__} {trt.__version__} cannot load {PLAN}")
        return loaded

    def context(self, profile: str, stream: int, repeats: bool) -> Any:
        """An execution context for one profile, with activations for it alone (ON_PROFILE_CHANGE): the other one's
        may be many times larger.

        `repeats`: its steps have one shape, or few. TensorRT-RTX then records CUDA graphs itself (CudaGraphStrategy
        .WHOLE_GRAPH_CAPTURE): kernels change under a caller that would, once those for its shapes are compiled. They
        are compiled at once then; where shapes vary, while slower ones serve.
        """
        config = self.engine.create_runtime_config()
        strategy = self.trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        config.set_execution_context_allocation_strategy(strategy)
        if self.records_graphs and repeats:
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            eager = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        context = self.engine.create_execution_context(config)
        number = self.index.profile_number(profile)
        if context is None or not context.set_optimization_profile_async(number, stream):
            raise self.refused(f"no execution context for the profile {profile}")
        self._kept.append(config)
        return context

    @property
    def records_graphs(self) -> bool:
        """Whether the runtime records CUDA graphs by itself."""
        return hasattr(self.trt, "CudaGraphStrategy")

    def close(self) -> None:
        """Let go of the engine, then of what it stands on."""
        self.engine = None
        while self._kept:
            self._kept.pop()

    def refused(self, what: str) -> ArtifactError:
        """An error with what the runtime said last."""
        said = self.messages[-1].strip().splitlines()[0][:300] if self.messages else "it gave no reason"
        return ArtifactError(
            "tensorrt.runtime", f"{what}: {said}", "enginesmith inspect ENGINE --for-host tells what does not fit"
        )


def _collecting_logger(trt: Any, messages: list[str]) -> Any:
    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                messages.append(text)

    return Collector()
