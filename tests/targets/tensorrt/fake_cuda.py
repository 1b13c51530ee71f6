"""A CUDA driver in this process: device memory is host memory, work runs when it is queued, every call is recorded."""

import ctypes
from collections import Counter
from collections.abc import Callable
from typing import Any

NAMES = {
    2: b"CUDA_ERROR_OUT_OF_MEMORY",
    700: b"CUDA_ERROR_ILLEGAL_ADDRESS",
    900: b"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
}
MAKES = {
    "cuMemAlloc_v2": "memory",
    "cuMemHostAlloc": "pinned",
    "cuStreamCreate": "stream",
    "cuStreamEndCapture": "graph",
    "cuGraphInstantiateWithFlags": "executable",
    "cuDevicePrimaryCtxRetain": "context",
}
FREES = {
    "cuMemFree_v2": "memory",
    "cuMemFreeHost": "pinned",
    "cuStreamDestroy_v2": "stream",
    "cuGraphDestroy": "graph",
    "cuGraphExecDestroy": "executable",
    "cuDevicePrimaryCtxRelease_v2": "context",
}


class FakeCuda:
    """`fail_at` n: the n-th call, counted from 1, returns `code`; asking for an error's name is no call.

    Between the two capture calls nothing that is queued runs; launching a graph runs it all.
    """

    def __init__(self, gpus: int = 1, fail_at: int = 0, code: int = 2) -> None:
        self.gpus, self.fail_at, self.code = gpus, fail_at, code
        self.calls: list[str] = []
        self.alive: Counter[str] = Counter()
        self.captured: list[Callable[[], object]] | None = None
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self._memory: dict[int, Any] = {}
        self._next = 1

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: self._call(name, arguments)

    def queue(self, work: Callable[[], object]) -> None:
        """What a stream would do in order."""
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> int:
        if name.startswith("cuGetError"):
            code, out = arguments
            out._obj.value = NAMES.get(code, b"CUDA_ERROR_UNKNOWN") if name == "cuGetErrorName" else b"it went wrong"
            return 0
        self.calls.append(name)
        if len(self.calls) == self.fail_at:
            self._failing(name, arguments)
            return self.code
        getattr(self, f"_{name}", lambda *_: None)(*arguments)
        if name in MAKES:
            self.alive[MAKES[name]] += 1
        if name in FREES:
            self.alive[FREES[name]] -= 1
            assert self.alive[FREES[name]] >= 0, f"{name}: freed twice"
        return 0

    def _failing(self, name: str, arguments: tuple[Any, ...]) -> None:
        """A failed release leaves the thing dead all the same, and a failed end of a recording ends it."""
        if name in FREES:
            self.alive[FREES[name]] -= 1
        if name == "cuStreamEndCapture":
            self.captured = None

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def _cuDeviceGetCount(self, out: Any) -> None:
        out._obj.value = self.gpus

    def _cuDeviceGet(self, out: Any, number: int) -> None:
        out._obj.value = number

    def _cuDevicePrimaryCtxRetain(self, out: Any, device: int) -> None:
        out._obj.value = self._handle()

    def _cuStreamCreate(self, out: Any, flags: int) -> None:
        assert flags == 1
        out._obj.value = self._handle()

    def _allocate(self, out: Any, size: int, fill: int) -> None:
        """Aligned to 256, filled with what nobody should read."""
        whole = (ctypes.c_ubyte * (size + 256))(*([fill] * (size + 256)))
        address = (ctypes.addressof(whole) + 255) // 256 * 256
        self._memory[address] = whole
        out._obj.value = address

    def _cuMemAlloc_v2(self, out: Any, size: int) -> None:
        self._allocate(out, size, 0x7E)

    def _cuMemHostAlloc(self, out: Any, size: int, flags: int) -> None:
        self._allocate(out, size, 0x7E)

    def _cuMemFree_v2(self, address: int) -> None:
        del self._memory[address]

    _cuMemFreeHost = _cuMemFree_v2

    def _cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> None:
        self.queue(lambda: ctypes.memset(address, value, size))

    def _copy(self, target: int, source: int, size: int, stream: int) -> None:
        self.queue(lambda: ctypes.memmove(target, source, size))

    _cuMemcpyHtoDAsync_v2 = _cuMemcpyDtoHAsync_v2 = _copy

    def _cuStreamBeginCapture_v2(self, stream: int, mode: int) -> None:
        assert self.captured is None
        self.captured = []

    def _cuStreamEndCapture(self, stream: int, out: Any) -> None:
        assert self.captured is not None
        out._obj.value = self._handle()
        self.graphs[out._obj.value], self.captured = self.captured, None

    def _cuGraphInstantiateWithFlags(self, out: Any, graph: int, flags: int) -> None:
        out._obj.value = self._handle()
        self.graphs[out._obj.value] = self.graphs[graph]

    def _cuGraphLaunch(self, executable: int, stream: int) -> None:
        for work in self.graphs[executable]:
            self.queue(work)
