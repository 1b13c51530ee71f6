"""An engine on a GPU: caches stay on the device, every tensor keeps one address, a decoding step is one CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from exporter.core.config import ModelConfig
from exporter.core.errors import ArtifactError, UnsupportedError
from targets.base import Limits, RunOptions
from targets.tensorrt.cuda_driver import CudaDriver, CudaError, CudaMissing
from targets.tensorrt.cuda_graphs import RecordedWork
from targets.tensorrt.device_buffers import DeviceBuffers, aligned
from targets.tensorrt.engine_index import DECODE, EngineIndex
from targets.tensorrt.executor import StepResult
from targets.tensorrt.file_names import PLAN
from targets.tensorrt.instrumented import instrumented_plan
from targets.tensorrt.runner import TensorRtRunner, check_index
from targets.tensorrt.runtime import LoadedEngine
from targets.tensorrt.step_plan import Step
from targets.tensorrt.toolkit import load_toolkit

IDS = np.dtype(np.int64)


def open_engine(engine_dir: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> TensorRtRunner:
    """A runner on engine.plan. Raises UnsupportedError without a GPU or the toolkit, ArtifactError where the engine
    does not fit. With hidden states a second engine is built from its graph, which shows them."""
    index = EngineIndex.read(engine_dir)
    check_index(index, config, limits)
    trt = load_toolkit(index.toolkit).module
    plan = instrumented_plan(engine_dir, index) if options.hidden_states else engine_dir / PLAN
    with cuda_errors():
        execution = TensorRtExecution(trt, index, plan, options.batch, options.hidden_states)
    return TensorRtRunner(execution, index, config, limits, options)


class TensorRtExecution:
    """targets.tensorrt.executor.Executor on TensorRT's runtime; `driver` stands in for CUDA's in tests."""

    def __init__(
        self,
        trt: Any,
        index: EngineIndex,
        plan: Path | bytes,
        batch: int,
        hidden_states: bool = False,
        driver: Callable[[], CudaDriver] = CudaDriver,
    ) -> None:
        self._index, self._batch = index, batch
        self._hidden = index.hidden_names if hidden_states else []
        self._profiles: dict[str, _ProfileStep] = {}
        self._loaded: LoadedEngine | None = None
        self._buffers: DeviceBuffers | None = DeviceBuffers(driver())
        try:
            self._open(trt, plan, self._buffers)
        except BaseException:
            self.close()
            raise

    def _open(self, trt: Any, plan: Path | bytes, buffers: DeviceBuffers) -> None:
        index = self._index
        self._loaded = loaded = LoadedEngine.load(trt, index, plan)
        wanted = tensors(index, self._batch, bool(self._hidden))
        check_tensors(loaded, wanted)
        shared = self._caches(buffers, wanted) | {"logits": buffers.device(wanted["logits"].nbytes(1))}
        shared |= {name: buffers.device(wanted[name].nbytes(index.longest_step)) for name in self._hidden}
        for profile in index.profiles:
            self._profiles[profile.name] = _ProfileStep(
                loaded, buffers, profile.name, wanted, shared, profile.sequence[2]
            )
        self._logits = buffers.pinned(wanted["logits"].nbytes(1)).view(np.float32).reshape(self._batch, -1)
        self._logits_at, self._hidden_at, self._wanted = shared["logits"], shared, wanted

    def _caches(self, buffers: DeviceBuffers, wanted: "dict[str, Tensor]") -> dict[str, int]:
        """Zeros, each under two names: what a layer reads and what it writes are one. Zeros because attention weighs
        what it does not see with 0, and 0 times whatever lay there before may not be 0."""
        addresses: dict[str, int] = {}
        for name in self._index.cache_names:
            address = buffers.zeros(wanted[f"past_key_values.{name}"].nbytes(1))
            addresses |= {f"past_key_values.{name}": address, f"present.{name}": address}
        return addresses

    @property
    def graph_refused(self) -> str:
        """Why steps are not replayed as a CUDA graph; empty where they are, or where it is not known yet."""
        return next((step.work.refused for step in self._profiles.values() if step.work.refused), "")

    def step(self, step: Step, profile: str) -> StepResult:
        if self._buffers is None:
            raise ArtifactError("run.closed", "the engine is closed", "open it again")
        buffers = self._buffers
        with cuda_errors():
            buffers.driver.make_current()
            self._profiles[profile].run(step)
            wanted = bool(step.ended.any())
            if wanted:
                buffers.download(self._logits_at, self._logits)
            hidden = tuple(self._download_hidden(buffers, name, step.width) for name in self._hidden)
            buffers.synchronize()
        return StepResult(
            self._logits.copy() if wanted else None, tuple(np.asarray(each, np.float32) for each in hidden)
        )

    def _download_hidden(self, buffers: DeviceBuffers, name: str, width: int) -> np.ndarray:
        array = np.empty((self._batch, width, self._index.hidden_size), self._wanted[name].dtype)
        buffers.download(self._hidden_at[name], array)
        return array

    def close(self) -> None:
        """Wait for the GPU, let go of contexts and engine, then of memory and CUDA's context, whatever fails."""
        buffers, self._buffers = self._buffers, None
        if buffers is None:
            return
        loaded, self._loaded = self._loaded, None
        with cuda_errors():
            try:
                buffers.driver.make_current()
                buffers.synchronize()
            finally:
                self._profiles.clear()
                if loaded is not None:
                    loaded.close()
                buffers.close()


@dataclass(frozen=True)
class Tensor:
    """An input or output: `shape` [B, S, ..] with None where S stands."""

    dtype: np.dtype
    shape: tuple[int | None, ...]

    def of(self, width: int) -> tuple[int, ...]:
        return tuple(width if size is None else size for size in self.shape)

    def nbytes(self, width: int) -> int:
        return int(np.prod(self.of(width))) * self.dtype.itemsize


def tensors(index: EngineIndex, batch: int, hidden_states: bool) -> dict[str, Tensor]:
    """Every input and output of an engine, for `batch` rows. Hidden states come in float32."""
    made = {name: Tensor(IDS, (batch, None)) for name in ("input_ids", "position_ids")}
    made |= {name: Tensor(IDS, (batch,)) for name in (("write_indices",) if index.has_cache else ()) + ("last_rows",)}
    cache = Tensor(np.dtype(np.float16 if index.cache_type == "fp16" else ml_dtypes.bfloat16), index.cache_shape(batch))
    for name in index.cache_names:
        made |= {f"past_key_values.{name}": cache, f"present.{name}": cache}
    made["logits"] = Tensor(np.dtype(np.float32), (batch, index.outputs))
    names = index.hidden_names if hidden_states else []
    return made | {name: Tensor(np.dtype(np.float32), (batch, None, index.hidden_size)) for name in names}


def check_tensors(loaded: LoadedEngine, wanted: dict[str, Tensor]) -> None:
    """The engine's inputs and outputs are those that engine.json tells of, by name and type."""
    engine = loaded.engine
    names = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
    if names != wanted.keys():
        differ = sorted(names ^ wanted.keys())
        raise loaded.refused(f"{PLAN} and engine.json differ in the tensors {', '.join(differ[:4])}")
    types = numpy_types(loaded.trt)
    for name, tensor in wanted.items():
        kind = engine.get_tensor_dtype(name)
        if types.get(kind) != tensor.dtype:
            raise loaded.refused(f"{PLAN} has {name} in {kind}, engine.json in {tensor.dtype}")


def numpy_types(trt: Any) -> dict[Any, np.dtype]:
    return {
        trt.DataType.INT64: IDS,
        trt.DataType.FLOAT: np.dtype(np.float32),
        trt.DataType.HALF: np.dtype(np.float16),
        trt.DataType.BF16: np.dtype(ml_dtypes.bfloat16),
    }


class _ProfileStep:
    """One profile's context, with its token inputs in one block: a step uploads them in a single copy."""

    def __init__(
        self,
        loaded: LoadedEngine,
        buffers: DeviceBuffers,
        profile: str,
        wanted: dict[str, Tensor],
        shared: dict[str, int],
        widest: int,
    ) -> None:
        self._loaded, self._buffers, self._wanted = loaded, buffers, wanted
        # Steps of one width again and again: decoding, and prompts that a classifier gets padded to one length.
        repeats = profile == DECODE or not loaded.index.has_cache
        self._context = loaded.context(profile, buffers.stream, repeats)
        self._offsets, self._nbytes = _layout(wanted, widest)
        self._host, self._device = buffers.pinned(self._nbytes), buffers.device(self._nbytes)
        own = {name: self._device + offset for name, offset in self._offsets.items()}
        for name, address in (shared | own).items():
            self._require(self._context.set_tensor_address(name, address), f"the address of {name}")
        self._width = 0
        self._replays = repeats and not loaded.records_graphs
        self.work = RecordedWork(buffers, self._enqueue)

    def run(self, step: Step) -> None:
        """Queue a step: token inputs up, the shapes if they are new, the engine."""
        for name, offset in self._offsets.items():
            values = step.feeds[name]
            self._host[offset : offset + values.nbytes] = np.frombuffer(values.tobytes(), np.uint8)
        self._buffers.upload(self._host, self._device)
        if step.width != self._width:
            self._reshape(step.width)
        if self._replays:
            self.work()
        else:
            self._enqueue()

    def _reshape(self, width: int) -> None:
        self.work.forget()
        for name, tensor in self._wanted.items():
            if name in self._offsets or name.startswith("past_key_values."):
                self._require(self._context.set_input_shape(name, tensor.of(width)), f"{name} {tensor.of(width)}")
        self._width = width

    def _enqueue(self) -> None:
        self._require(self._context.execute_async_v3(self._buffers.stream), "a step")

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise self._loaded.refused(f"the engine refuses {what}")


def _layout(wanted: dict[str, Tensor], widest: int) -> tuple[dict[str, int], int]:
    """Offsets of the token inputs in one block, and its size."""
    offsets, total = {}, 0
    for name, tensor in wanted.items():
        if tensor.dtype == IDS:
            offsets[name] = total
            total += aligned(tensor.nbytes(widest))
    return offsets, total


@contextmanager
def cuda_errors() -> Iterator[None]:
    """CUDA's failures in our words, with the name that CUDA gives them."""
    try:
        yield
    except CudaMissing as error:
        raise UnsupportedError(
            "tensorrt.gpu_missing", f"the engine needs an NVIDIA GPU: {error}", "run it on a machine that has one"
        ) from error
    except CudaError as error:
        if error.name == "CUDA_ERROR_OUT_OF_MEMORY":
            remedy = "ask for fewer rows or a shorter --max-seq-len, or use a larger GPU"
            raise ArtifactError("gpu.memory", f"the GPU has too little free memory: {error}", remedy) from error
        raise ArtifactError(
            "tensorrt.cuda", f"CUDA failed: {error}", "see the driver's log; open the engine again"
        ) from error
