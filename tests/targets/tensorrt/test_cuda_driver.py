"""The CUDA driver's calls against a stand-in that fails wherever it is told to: nothing leaks, errors have names."""

import ctypes

import numpy as np
import pytest

from targets.tensorrt import cuda_driver
from targets.tensorrt.cuda_driver import SIGNATURES, CudaDriver, CudaError, CudaMissing, load_library
from targets.tensorrt.cuda_graphs import RecordedWork
from targets.tensorrt.device_buffers import ALIGNMENT, DeviceBuffers, aligned
from tests.targets.tensorrt.fake_cuda import FakeCuda


def work(library: FakeCuda) -> np.ndarray:
    """Everything that buffers can do, once -> what came back from the device."""
    buffers = DeviceBuffers(CudaDriver(library=library))
    try:
        host, address = buffers.pinned(64), buffers.zeros(64)
        host[:] = np.arange(64)
        back = np.empty(64, np.uint8)
        recorded = RecordedWork(buffers, lambda: buffers.upload(host, address))
        for _ in range(3):
            recorded()
        buffers.download(address, back)
        buffers.synchronize()
        return back
    finally:
        buffers.close()
        buffers.close()


def test_what_goes_up_comes_back_and_all_is_freed():
    library = FakeCuda()
    np.testing.assert_array_equal(work(library), np.arange(64))
    assert not +library.alive
    assert library.calls[-1] == "cuDevicePrimaryCtxRelease_v2"
    assert library.calls.count("cuGraphLaunch") == 2


@pytest.mark.parametrize("call", range(1, 40))
def test_a_failure_anywhere_leaks_nothing(call):
    """Recording alone, and what is called in it, may fail without an error: work is queued call by call then."""
    library = FakeCuda(fail_at=call, code=700)
    try:
        back = work(library)
    except CudaError as error:
        assert error.name == "CUDA_ERROR_ILLEGAL_ADDRESS" and str(error).startswith(library.calls[call - 1])
    else:
        np.testing.assert_array_equal(back, np.arange(64))
        failed = library.calls[call - 1] if call <= len(library.calls) else "none"
        assert failed in ("none", "cuMemcpyHtoDAsync_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags")
    assert not +library.alive, dict(library.alive)


def test_work_is_recorded_the_second_time_and_launched_from_then_on():
    library, times = FakeCuda(), []
    buffers = DeviceBuffers(CudaDriver(library=library))
    recorded = RecordedWork(buffers, lambda: library.queue(lambda: times.append(1)))
    recorded()
    assert not recorded.recorded and "cuStreamBeginCapture_v2" not in library.calls
    for count in (2, 3, 4):
        recorded()
        assert len(times) == count
    assert library.calls.count("cuStreamBeginCapture_v2") == 1 and library.calls.count("cuGraphLaunch") == 3
    buffers.close()


def test_what_cannot_be_recorded_is_queued_and_says_why():
    library, times = FakeCuda(), []

    def enqueue() -> None:
        if library.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        times.append(1)

    buffers = DeviceBuffers(CudaDriver(library=library))
    recorded = RecordedWork(buffers, enqueue)
    for _ in range(3):
        recorded()
    assert len(times) == 3 and "not permitted" in recorded.refused
    assert library.calls.count("cuStreamBeginCapture_v2") == library.calls.count("cuStreamEndCapture") == 1
    buffers.close()
    assert not +library.alive


def test_no_gpu_and_no_driver():
    with pytest.raises(CudaMissing, match="sees 0 GPUs"):
        CudaDriver(library=FakeCuda(gpus=0))
    with pytest.raises(CudaError, match="cuInit: CUDA_ERROR_OUT_OF_MEMORY"):
        CudaDriver(library=FakeCuda(fail_at=1))


def test_a_missing_driver_is_said(monkeypatch):
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda-that-is-not-there.so")
    with pytest.raises(CudaMissing, match="no NVIDIA driver"):
        load_library()


def test_addresses_are_declared_wide_enough():
    """A device address beyond 32 bits would be cut if ctypes took it for an int."""
    for name, arguments in SIGNATURES.items():
        assert all(
            kind is not ctypes.c_int or name.startswith(("cuDevice", "cuGetError", "cuStreamBegin"))
            for kind in arguments
        ), name


def test_alignment():
    assert [aligned(n) for n in (0, 1, 256, 257)] == [0, ALIGNMENT, ALIGNMENT, 2 * ALIGNMENT]
