"""The CUDA driver through its C interface: memory, one stream, copies, graphs. Neither torch nor cuda-python is needed.

Function and error names are those of the CUDA Driver API manual; names that end in _v2 are what cuda.h maps the plain
ones to. Every call is checked: an error becomes a CudaError with the driver's own name for it.
"""

import ctypes
from typing import Any

LIBRARY = "libcuda.so.1"
NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: no waiting for the default stream."""
CAPTURE_THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may call what a capture forbids."""

_POINTER, _SIZE, _INT, _UINT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint
_OUT = ctypes.c_void_p  # address of what the driver fills in
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_UINT,),
    "cuDeviceGetCount": (_OUT,),
    "cuDeviceGet": (_OUT, _INT),
    "cuDeviceGetName": (ctypes.c_char_p, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_OUT, _INT),
    "cuDevicePrimaryCtxRelease_v2": (_INT,),
    "cuCtxSetCurrent": (_POINTER,),
    "cuMemGetInfo_v2": (_OUT, _OUT),
    "cuMemAlloc_v2": (_OUT, _SIZE),
    "cuMemFree_v2": (ctypes.c_uint64,),
    "cuMemsetD8Async": (ctypes.c_uint64, ctypes.c_ubyte, _SIZE, _POINTER),
    "cuMemHostAlloc": (_OUT, _SIZE, _UINT),
    "cuMemFreeHost": (_POINTER,),
    "cuMemcpyHtoDAsync_v2": (ctypes.c_uint64, _POINTER, _SIZE, _POINTER),
    "cuMemcpyDtoHAsync_v2": (_POINTER, ctypes.c_uint64, _SIZE, _POINTER),
    "cuStreamCreate": (_OUT, _UINT),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuStreamSynchronize": (_POINTER,),
    "cuStreamBeginCapture_v2": (_POINTER, _INT),
    "cuStreamEndCapture": (_POINTER, _OUT),
    "cuGraphInstantiateWithFlags": (_OUT, _POINTER, ctypes.c_uint64),
    "cuGraphLaunch": (_POINTER, _POINTER),
    "cuGraphExecDestroy": (_POINTER,),
    "cuGraphDestroy": (_POINTER,),
    "cuEventCreate": (_OUT, _UINT),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuEventSynchronize": (_POINTER,),
    "cuEventElapsedTime": (_OUT, _POINTER, _POINTER),
    "cuEventDestroy_v2": (_POINTER,),
    "cuGetErrorName": (_INT, _OUT),
    "cuGetErrorString": (_INT, _OUT),
}


class CudaError(RuntimeError):
    """A driver call that failed; `name` is CUDA's (`CUDA_ERROR_OUT_OF_MEMORY`)."""

    def __init__(self, call: str, code: int, name: str, text: str) -> None:
        super().__init__(f"{call}: {name} ({code}){': ' if text else ''}{text}")
        self.call, self.code, self.name = call, code, name


class CudaMissing(RuntimeError):
    """There is no CUDA driver, or no GPU behind it."""


class CudaDriver:
    """The driver with the primary context of one GPU current on this thread; TensorRT's runtime uses that one too.

    `library` stands in for libcuda in tests. Closing gives the context back; what was allocated is freed by its owner.
    """

    def __init__(self, device: int = 0, library: Any = None) -> None:
        self._library = library if library is not None else load_library()
        self._device: int | None = None
        self.call("cuInit", 0)
        count = self.filled(ctypes.c_int, "cuDeviceGetCount")
        if count <= device:
            raise CudaMissing(f"the CUDA driver sees {count} GPUs")
        number = self.filled(ctypes.c_int, "cuDeviceGet", device)
        self._context: int = self.filled(ctypes.c_void_p, "cuDevicePrimaryCtxRetain", number)
        self._device = number
        try:
            self.make_current()
        except CudaError:
            self.close()
            raise

    def make_current(self) -> None:
        """The context belongs to a thread: every one that calls the driver needs it."""
        self.call("cuCtxSetCurrent", self._context)

    def close(self) -> None:
        device, self._device = self._device, None
        if device is not None:
            self.call("cuDevicePrimaryCtxRelease_v2", device)

    def call(self, function: str, *arguments: Any) -> None:
        """Call the driver; raises CudaError unless it succeeds."""
        code = getattr(self._library, function)(*arguments)
        if code:
            raise CudaError(function, code, self._text("cuGetErrorName", code), self._text("cuGetErrorString", code))

    def filled(self, kind: Any, function: str, *arguments: Any) -> Any:
        """Call a function whose first argument is the address of its result -> that result."""
        value = kind()
        self.call(function, ctypes.byref(value), *arguments)
        return value.value

    @property
    def free_memory(self) -> tuple[int, int]:
        """(free, total) bytes of the GPU."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def _text(self, function: str, code: int) -> str:
        text = ctypes.c_char_p()
        failed = getattr(self._library, function)(code, ctypes.byref(text))
        return text.value.decode(errors="replace") if not failed and text.value else f"error {code}"


def load_library() -> Any:
    """libcuda with its signatures declared. Raises CudaMissing where there is none."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise CudaMissing(f"there is no NVIDIA driver: {error}") from error
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return library
