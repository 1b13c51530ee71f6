"""Work that is queued on a stream again and again, recorded once as a CUDA graph and launched with a single call."""

import ctypes
from collections.abc import Callable

from targets.tensorrt.cuda_driver import CAPTURE_THREAD_LOCAL, CudaError
from targets.tensorrt.device_buffers import DeviceBuffers


class RecordedWork:
    """Calls `enqueue` the first time, records it the second time, launches the recording from then on.

    The first call has to run outside a recording: TensorRT finishes there what a change of shapes left to do, which
    may wait for the GPU (TensorRT documentation, "CUDA Graphs"). Addresses and shapes must be the same in every call
    until `forget`. Where recording fails, work is queued call by call from then on, and `refused` says why.
    """

    def __init__(self, buffers: DeviceBuffers, enqueue: Callable[[], None]) -> None:
        self._buffers, self._enqueue = buffers, enqueue
        self._warm = False
        self._executable: int | None = None
        self.refused = ""
        buffers.on_close(self.forget)

    def __call__(self) -> None:
        if self._executable is None and self._warm and not self.refused:
            self._record()
        if self._executable is not None:
            self._buffers.driver.call("cuGraphLaunch", self._executable, self._buffers.stream)
        else:
            self._enqueue()
            self._warm = True

    def forget(self) -> None:
        """Shapes or addresses changed: start over."""
        self._warm = False
        executable, self._executable = self._executable, None
        if executable is not None:
            self._buffers.driver.call("cuGraphExecDestroy", executable)

    @property
    def recorded(self) -> bool:
        return self._executable is not None

    def _record(self) -> None:
        """A recording queues nothing: the graph is launched afterwards."""
        driver, stream = self._buffers.driver, self._buffers.stream
        driver.call("cuStreamBeginCapture_v2", stream, CAPTURE_THREAD_LOCAL)
        failure: Exception | None = None
        try:
            self._enqueue()
        except (CudaError, RuntimeError) as error:
            failure = error
        graph = ctypes.c_void_p()
        try:
            driver.call("cuStreamEndCapture", stream, ctypes.byref(graph))
            if failure is None:
                self._instantiate(graph.value or 0)
        except CudaError as error:
            failure = failure or error
        finally:
            if graph.value:
                driver.call("cuGraphDestroy", graph.value)
        self.refused = str(failure) if failure else ""

    def _instantiate(self, graph: int) -> None:
        driver = self._buffers.driver
        self._executable = driver.filled(ctypes.c_void_p, "cuGraphInstantiateWithFlags", graph, 0)
