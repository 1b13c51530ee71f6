"""The GPU's executor with TensorRT and CUDA stood in for: what is called, in which order, at which addresses."""

from pathlib import Path

import numpy as np
import pytest

from exporter.core.errors import ArtifactError, UnsupportedError
from targets.base import RunOptions
from targets.tensorrt.cuda_driver import CudaDriver
from targets.tensorrt.execution import TensorRtExecution, cuda_errors, open_engine
from targets.tensorrt.file_names import MODEL
from targets.tensorrt.instrumented import with_hidden_states
from targets.tensorrt.runner import TensorRtRunner
from tests.targets.engines import random_ids
from tests.targets.tensorrt.contract_engines import LIMITS, ContractEngine, contract_engine
from tests.targets.tensorrt.fake_cuda import FakeCuda
from tests.targets.tensorrt.fake_tensorrt import FakeTensorRt


@pytest.fixture(scope="module")
def engine(tiny_checkpoint, tmp_path_factory) -> ContractEngine:
    return contract_engine(tiny_checkpoint("gqa"), tmp_path_factory.mktemp("engine"))


class Opened:
    """A runner on stand-ins."""

    def __init__(
        self, engine: ContractEngine, batch: int = 1, rtx: bool = False, refuse: str = "", hidden: bool = False
    ) -> None:
        self.cuda, model = FakeCuda(), engine.folder / MODEL
        self.trt = FakeTensorRt(self.cuda, engine.index, rtx, refuse)
        if hidden:
            model = engine.folder / "shown.onnx"
            with_hidden_states(engine.folder / MODEL, engine.index, model)
        plan = str(model).encode()
        self.execution = TensorRtExecution(self.trt, engine.index, plan, batch, hidden, self.driver)
        options = RunOptions(1, batch, None, hidden)
        config = engine.checkpoint.config
        self.runner = TensorRtRunner(self.execution, engine.index, config, engine.limits, options)

    def driver(self) -> CudaDriver:
        return CudaDriver(library=self.cuda)

    def launches(self) -> int:
        return self.cuda.calls.count("cuGraphLaunch")


@pytest.mark.parametrize("rtx", [False, True])
def test_the_runner_gives_what_the_stand_in_gives(engine, rtx):
    """Same graph, same steps, other memory: bit for bit, over prefill in chunks, ragged decoding, cut rows."""
    ids, lengths = random_ids(engine.checkpoint.config, 3, 30), np.array([30, 1, 22])
    opened = Opened(engine, 3, rtx)
    with opened.runner as runner, engine.stand_in(batch=3) as expected:
        np.testing.assert_array_equal(runner.prefill(ids, lengths), expected.prefill(ids, lengths))
        for step in range(4):
            active = np.array([True, step != 2, step > 0])
            ours, theirs = (each.decode(ids[:, step], active) for each in (runner, expected))
            np.testing.assert_array_equal(ours[active], theirs[active])
        for each in (runner, expected):
            each.truncate(2, 5)
        part = np.array([0, 3, 7])
        ours, theirs = (each.extend(ids[:, :7], part) for each in (runner, expected))
        np.testing.assert_array_equal(ours, theirs)
    assert not +opened.cuda.alive


def test_caches_are_read_and_written_at_one_address_by_both_profiles(engine):
    opened = Opened(engine, 2)
    decode, prefill = opened.trt.contexts
    assert (decode.profile, prefill.profile) == (0, 1)
    names = [name for name in decode.addresses if name.startswith("past_key_values.")]
    assert len(names) == 2 * engine.checkpoint.config.num_layers
    for name in names:
        present = name.replace("past_key_values", "present")
        assert len({context.addresses[key] for context in (decode, prefill) for key in (name, present)}) == 1
    others = [decode.addresses[name] for name in names]
    assert len(set(others)) == len(others)
    opened.runner.close()


def test_decoding_is_recorded_once_and_replayed(engine):
    """TensorRT: the first step is queued, the second recorded and launched, the rest launched."""
    opened = Opened(engine)
    with opened.runner as runner:
        runner.prefill(np.ones((1, 5), np.int64), np.array([5]))
        for step in range(6):
            runner.decode(np.array([step]), np.array([True]))
        decode, prefill = opened.trt.contexts
        assert (decode.executions, decode.runs, opened.launches()) == (2, 6, 5)
        assert (prefill.executions, prefill.runs) == (1, 1)
        assert opened.cuda.calls.count("cuStreamBeginCapture_v2") == 1
        assert opened.execution.graph_refused == ""


def test_rtx_records_by_itself(engine):
    opened = Opened(engine, rtx=True)
    with opened.runner as runner:
        runner.prefill(np.ones((1, 5), np.int64), np.array([5]))
        for step in range(4):
            runner.decode(np.array([step]), np.array([True]))
        decode, prefill = opened.trt.contexts
        assert decode.config.cuda_graph_strategy == "whole"
        assert decode.config.dynamic_shapes_kernel_specialization_strategy == "eager"
        assert not hasattr(prefill.config, "cuda_graph_strategy")
        assert decode.executions == 4 and "cuStreamBeginCapture_v2" not in opened.cuda.calls


def test_one_copy_up_and_one_down_a_step(engine):
    opened = Opened(engine)
    with opened.runner as runner:
        runner.prefill(np.ones((1, 5), np.int64), np.array([5]))
        before = len(opened.cuda.calls)
        runner.decode(np.array([3]), np.array([True]))
        assert opened.cuda.calls[before:] == [
            "cuCtxSetCurrent",
            "cuMemcpyHtoDAsync_v2",
            "cuMemcpyDtoHAsync_v2",
            "cuStreamSynchronize",
        ]


def test_hidden_states_come_from_an_instrumented_engine(engine):
    ids, lengths = random_ids(engine.checkpoint.config, 2, 20), np.array([20, 6])
    with Opened(engine, 2, hidden=True).runner as runner, engine.stand_in(batch=2, hidden=True) as expected:
        runner.prefill(ids, lengths)
        expected.prefill(ids, lengths)
        for ours, theirs in zip(runner.hidden, expected.hidden, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("deserialize", "version tag does not match"),
        ("set_optimization_profile_async", "profile decode"),
        ("set_tensor_address", "the address of"),
    ],
)
def test_what_the_runtime_refuses_on_opening_is_said_and_freed(engine, method, told):
    cuda = FakeCuda()
    trt = FakeTensorRt(cuda, engine.index, refuse=method)
    with pytest.raises(ArtifactError, match=told) as caught:
        TensorRtExecution(trt, engine.index, str(engine.folder / MODEL).encode(), 1, driver=lambda: CudaDriver(0, cuda))
    assert caught.value.exit_code == 5
    assert not +cuda.alive


@pytest.mark.parametrize("method", ["set_input_shape", "execute_async_v3"])
def test_what_the_runtime_refuses_in_a_step_is_said(engine, method):
    opened = Opened(engine, refuse=method)
    with opened.runner as runner, pytest.raises(ArtifactError, match=f"{method}: it is refused"):
        runner.prefill(np.ones((1, 5), np.int64), np.array([5]))
    assert not +opened.cuda.alive


@pytest.mark.parametrize("call", range(3, 60, 2))
def test_a_failing_driver_leaks_nothing_and_is_named(engine, call):
    cuda = FakeCuda(fail_at=call, code=700)
    trt = FakeTensorRt(cuda, engine.index)

    def run() -> None:
        plan = str(engine.folder / MODEL).encode()
        with cuda_errors():  # as open_engine does
            execution = TensorRtExecution(trt, engine.index, plan, 1, driver=lambda: CudaDriver(0, cuda))
        options = RunOptions(1, 1)
        with TensorRtRunner(execution, engine.index, engine.checkpoint.config, LIMITS, options) as runner:
            runner.prefill(np.ones((1, 20), np.int64), np.array([20]))
            for _ in range(3):
                runner.decode(np.array([1]), np.array([True]))

    if call <= _calls_of_a_run(engine):
        try:
            run()
        except ArtifactError as error:
            assert "CUDA_ERROR_ILLEGAL_ADDRESS" in error.message
        else:
            assert cuda.calls[call - 1] in ("cuStreamEndCapture", "cuGraphInstantiateWithFlags")
    assert not +cuda.alive, dict(cuda.alive)


def _calls_of_a_run(engine: ContractEngine) -> int:
    opened = Opened(engine)
    with opened.runner as runner:
        runner.prefill(np.ones((1, 20), np.int64), np.array([20]))
        for _ in range(3):
            runner.decode(np.array([1]), np.array([True]))
    return len(opened.cuda.calls)


def test_too_little_memory_is_told_from_other_failures():
    with pytest.raises(ArtifactError) as caught, cuda_errors():
        CudaDriver(library=FakeCuda(fail_at=4, code=2))
    assert caught.value.kind == "gpu.memory"
    with pytest.raises(UnsupportedError) as missing, cuda_errors():
        CudaDriver(library=FakeCuda(gpus=0))
    assert missing.value.kind == "tensorrt.gpu_missing"


def test_an_engine_of_other_tensors_is_refused(engine, tmp_path, tiny_checkpoint):
    """engine.json of three layers over a graph of two."""
    other = contract_engine(tiny_checkpoint("mqa_three_layers"), tmp_path)
    cuda = FakeCuda()
    trt = FakeTensorRt(cuda, other.index)
    with pytest.raises(ArtifactError, match=r"differ in the tensors past_key_values\.2\.key"):
        TensorRtExecution(trt, other.index, str(engine.folder / MODEL).encode(), 1, driver=lambda: CudaDriver(0, cuda))
    assert not +cuda.alive


def test_host_code_runs_from_version_compatible_engines_alone(engine):
    from dataclasses import replace

    for allowed in (False, True):
        cuda, index = FakeCuda(), replace(engine.index, version_compatible=allowed)
        trt = FakeTensorRt(cuda, index)
        plan = str(engine.folder / MODEL).encode()
        TensorRtExecution(trt, index, plan, 1, driver=lambda cuda=cuda: CudaDriver(0, cuda)).close()
        assert trt.calls == [f"deserialize host_code={allowed}"]


def test_without_a_gpu_opening_says_so(engine, monkeypatch):
    from targets.tensorrt import cuda_driver

    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda-that-is-not-there.so")
    Path(engine.folder / "engine.plan").write_bytes(b"not looked at")
    with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
        open_engine(engine.folder, engine.checkpoint.config, LIMITS, RunOptions())


def test_a_classifier_is_recorded_while_prompts_are_as_wide_as_before(tiny_checkpoint, tmp_path):
    """A new width is a new recording; the old one is destroyed."""
    opened = Opened(contract_engine(tiny_checkpoint("gqa"), tmp_path, labels=(7, 12)))
    with opened.runner as runner:
        for width in (5, 5, 5, 5, 9, 9, 9):
            runner.prefill(np.ones((1, width), np.int64), np.array([width]))
        (context,) = opened.trt.contexts
        assert context.runs == 7 and opened.launches() == 3 + 2 and context.executions == 2 + 2
        assert opened.cuda.calls.count("cuGraphExecDestroy") == 1
    assert not +opened.cuda.alive
