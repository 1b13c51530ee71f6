"""TensorRT's runtime classes over ONNX Runtime: a plan names a graph, a context computes it at the addresses it is
given, when FakeCuda runs what was queued. Names and order of calls are TensorRT's; every call is recorded."""

import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from targets.tensorrt.engine_index import EngineIndex
from tests.targets.tensorrt.fake_cuda import FakeCuda


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT64, INT32 = range(5)


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        self.ready = True


TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(int64)": (DataType.INT64, np.int64),
}


class FakeTensorRt:
    """A module like `tensorrt`, or with `rtx` like `tensorrt_rtx`. `refuse` names a method that returns failure."""

    __version__ = "11.4.0"
    __name__ = "tensorrt"
    DataType, ILogger = DataType, ILogger
    ExecutionContextAllocationStrategy = SimpleNamespace(ON_PROFILE_CHANGE="on profile change")

    def __init__(self, cuda: FakeCuda, index: EngineIndex, rtx: bool = False, refuse: str = "") -> None:
        self.cuda, self.index, self.refuse = cuda, index, refuse
        self.calls: list[str] = []
        self.contexts: list[FakeContext] = []
        if rtx:
            self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def Runtime(self, logger: Any) -> "FakeRuntime":
        assert logger.ready
        return FakeRuntime(self, logger)


class FakeRuntime:
    def __init__(self, trt: FakeTensorRt, logger: Any) -> None:
        self._trt, self._logger = trt, logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: Any) -> "FakeEngine | None":
        self._trt.calls.append(f"deserialize host_code={self.engine_host_code_allowed}")
        if self._trt.refuse == "deserialize":
            self._logger.log(Severity.INFO, "loading")
            self._logger.log(
                Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: version tag does not match"
            )
            return None
        return FakeEngine(self._trt, self._logger, Path(bytes(plan).decode()))


class FakeEngine:
    def __init__(self, trt: FakeTensorRt, logger: Any, model: Path) -> None:
        self.trt, self.logger = trt, logger
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.tensors = self.inputs | self.outputs

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, number: int) -> str:
        return list(self.tensors)[number]

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[self.tensors[name].type][0]

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(strategy=None)
        config.set_execution_context_allocation_strategy = lambda value: setattr(config, "strategy", value)
        return config

    def create_execution_context(self, config: Any) -> "FakeContext":
        assert config.strategy == "on profile change"
        context = FakeContext(self, config)
        self.trt.contexts.append(context)
        return context


class FakeContext:
    """`executions` counts what was queued, `runs` what ran."""

    def __init__(self, engine: FakeEngine, config: Any) -> None:
        self.engine, self.config = engine, config
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile = -1
        self.executions = self.runs = 0

    def _refuses(self, method: str) -> bool:
        if self.engine.trt.refuse == method:
            self.engine.logger.log(Severity.ERROR, f"IExecutionContext::{method}: it is refused")
        return self.engine.trt.refuse == method

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        self.profile = number
        return not self._refuses("set_optimization_profile_async")

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.tensors and address % 256 == 0
        self.addresses[name] = address
        return not self._refuses("set_tensor_address")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        profile = self.engine.trt.index.profiles[self.profile]
        assert profile.batch[0] <= shape[0] <= profile.batch[2]
        if name == "input_ids":
            assert profile.sequence[0] <= shape[1] <= profile.sequence[2]
        self.shapes[name] = tuple(shape)
        return not self._refuses("set_input_shape")

    def execute_async_v3(self, stream: int) -> bool:
        assert self.shapes.keys() == self.engine.inputs.keys() and self.addresses.keys() == self.engine.tensors.keys()
        self.executions += 1
        if self._refuses("execute_async_v3"):
            return False
        self.engine.trt.cuda.queue(self._run)
        return True

    def _run(self) -> None:
        self.runs += 1
        binding = self.engine.session.io_binding()
        for name, value in self.engine.inputs.items():
            kind = TYPES[value.type][1]
            binding.bind_input(name, "cpu", 0, kind, self.shapes[name], self.addresses[name])
        batch, width = self.shapes["input_ids"]
        for name, value in self.engine.outputs.items():
            shape = [batch, *(width if isinstance(size, str) else size for size in value.shape[1:])]
            shape = [batch, width, self.engine.trt.index.hidden_size] if name.endswith(".hidden") else shape
            binding.bind_output(name, "cpu", 0, TYPES[value.type][1], shape, self.addresses[name])
        self.engine.session.run_with_iobinding(binding)
