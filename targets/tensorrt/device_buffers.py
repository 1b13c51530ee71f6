"""Memory of a GPU, pinned memory of the host, and a stream, each freed exactly once whatever fails on the way."""

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from targets.tensorrt.cuda_driver import NON_BLOCKING, CudaDriver, CudaError

ALIGNMENT = 256
"""Of every address that TensorRT is given (IExecutionContext::setTensorAddress)."""


class DeviceBuffers:
    """What a step needs besides the engine. `stream`: all copies and computing go there, in order.

    Everything allocated is freed by `close`, last first; the driver's context goes last.
    """

    def __init__(self, driver: CudaDriver) -> None:
        self.driver = driver
        self.stream = 0
        self._stack: ExitStack | None = ExitStack()
        self._stack.callback(driver.close)
        try:
            self.stream = self._made(ctypes.c_void_p, "cuStreamDestroy_v2", "cuStreamCreate", NON_BLOCKING)
        except CudaError:
            self.close()
            raise

    def close(self) -> None:
        """Wait for the stream, then free everything; a second call does nothing. The first failure is raised at the
        end, after all the rest was freed."""
        stack, self._stack = self._stack, None
        if stack is not None:
            with stack:
                stack.callback(self._quiesce)

    def device(self, nbytes: int) -> int:
        """Device memory -> its address, a multiple of 256 (cuMemAlloc's guarantee for any type)."""
        return self._made(ctypes.c_uint64, "cuMemFree_v2", "cuMemAlloc_v2", max(nbytes, 1))

    def zeros(self, nbytes: int) -> int:
        """Device memory that holds zeros once the stream gets there."""
        address = self.device(nbytes)
        self.driver.call("cuMemsetD8Async", address, 0, max(nbytes, 1), self.stream)
        return address

    def pinned(self, nbytes: int) -> np.ndarray:
        """Host memory [nbytes] uint8 that copies run from and to without a detour; zeros. Not to be used after
        `close`."""
        address = self._made(ctypes.c_void_p, "cuMemFreeHost", "cuMemHostAlloc", max(nbytes, 1), 0)
        array: np.ndarray = np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address))
        array[:] = 0
        return array

    def upload(self, array: np.ndarray, address: int, nbytes: int | None = None) -> None:
        """Queue a copy of a contiguous array's bytes (its first `nbytes`) to device memory."""
        size = array.nbytes if nbytes is None else nbytes
        self.driver.call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, size, self.stream)

    def download(self, address: int, array: np.ndarray, nbytes: int | None = None) -> None:
        """Queue a copy of device memory into a contiguous array; it is there after `synchronize`."""
        size = array.nbytes if nbytes is None else nbytes
        self.driver.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, size, self.stream)

    def synchronize(self) -> None:
        self.driver.call("cuStreamSynchronize", self.stream)

    def on_close(self, free: Callable[[], object]) -> None:
        """Call `free` on closing, before everything that was made earlier."""
        if self._stack is None:
            raise RuntimeError("these buffers are closed")
        self._stack.callback(free)

    def _made(self, kind: Any, free: str, function: str, *arguments: Any) -> int:
        handle: int = self.driver.filled(kind, function, *arguments)
        self.on_close(lambda: self.driver.call(free, handle))
        return handle

    def _quiesce(self) -> None:
        if self.stream:
            self.driver.call("cuStreamSynchronize", self.stream)


def aligned(nbytes: int) -> int:
    """The next multiple of 256."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
