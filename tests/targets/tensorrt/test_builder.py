"""Plans built by TensorRT-RTX on this machine, which needs no GPU; graphs that it refuses, by the name of the node."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import psutil
import pytest

from exporter.artifact.host import check_host
from exporter.core.errors import UnsupportedError
from exporter.core.gpu import GpuHost, HostGpu
from exporter.core.machine import triple
from targets.tensorrt import builder
from targets.tensorrt.builder import build_plan
from targets.tensorrt.devices import BuildDevice
from targets.tensorrt.plan_report import EngineRequest, PlanReport
from targets.tensorrt.profiles import Profile
from tests.targets.tensorrt.typed_graphs import CACHE, FAULTS, KV_HEADS, LABELS, Decoder, save

pytest.importorskip("tensorrt_rtx")

PROFILES = (Profile("decode", (1, 1, 4), (1, 1, 1)), Profile("prefill", (1, 1, 4), (1, 16, 32)))


def request_for(*capabilities: str, **choices: bool) -> EngineRequest:
    return EngineRequest(BuildDevice("tensorrt_rtx", capabilities), PROFILES, **choices)


SM89 = request_for("8.9")
ROOT = Path(__file__).resolve().parents[3]


def ignore(fraction: float, detail: str) -> None:
    """No progress is shown."""


def build(model: onnx.ModelProto, folder: Path, request: EngineRequest = SM89) -> PlanReport:
    return build_plan(save(model, folder), request, folder / "engine.plan", ignore)


@pytest.mark.parametrize(
    ("precision", "products"),
    [
        ("fp16", {"HALF": 9}),
        ("fp8", {"FP8": 8, "HALF": 1}),
        ("int4", {"HALF": 1, "HALF x INT4": 8}),
    ],
)
def test_a_plan_is_built_and_told_about(tmp_path: Path, precision: str, products: dict[str, int]) -> None:
    report = build(Decoder(precision).model(), tmp_path)
    assert report.built_by.startswith("TensorRT-RTX 1.7") and report.built_by.endswith(" for SM89")
    assert report.plan_bytes == (tmp_path / "engine.plan").stat().st_size > 100_000
    precisions = report.layers["precisions"]
    assert precisions["MATRIX_MULTIPLY"] == products
    assert precisions["ATTENTION"] == {"HALF": 2} and precisions["KV_CACHE_UPDATE"] == {"HALF": 4}
    assert report.layers["matmuls"]["lm_head.matmul"] == {"HALF": 1}
    assert sum(report.layers["matmuls"]["layers.*.q.matmul"].values()) == 2
    assert report.layers["layers"]["ROTARY_EMBEDDING"] == 4
    for step in ("decode", "prefill"):
        kernels = report.kernels[step]
        assert set(kernels["products"]) == set(products) and sum(kernels["attention"].values()) == 2, kernels
    caches = 2 * 2 * 4 * KV_HEADS * CACHE * 32 * 2
    assert report.input_bytes == caches + 2 * 4 * 32 * 8 + 2 * 4 * 8 + 4 * LABELS * 4
    assert report.requirements["memory_bytes"] == report.plan_bytes + report.activation_bytes + report.input_bytes
    assert report.activation_bytes > 0 and report.weights_bytes > 0 and report.peak_bytes > 50_000_000
    assert PlanReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_what_it_needs_is_what_preflight_checks(tmp_path: Path) -> None:
    report = build(Decoder(layers=1).model(), tmp_path)
    needs = {"gpu": json.loads(json.dumps(report.requirements))}
    ada = HostGpu("NVIDIA L4", "8.9", 24 * 10**9)
    host = GpuHost("13.0", "580.65.06", (ada,), {"tensorrt_rtx": report.version})
    assert check_host(triple(), needs, host) == []
    hopper = GpuHost("13.0", "580.65.06", (HostGpu("NVIDIA H200", "9.0", 150 * 10**9),), host.toolkits)
    assert [found.what for found in check_host(triple(), needs, hopper)] == ["gpu.compute_capability"]


def test_one_plan_for_two_kinds_of_gpus(tmp_path: Path) -> None:
    report = build(Decoder("fp8", layers=1).model(), tmp_path, request_for("8.9", "12.0"))
    assert report.built_by.endswith("for SM89 and SM120")
    assert report.requirements["compute_capabilities"] == ["8.9", "12.0"]


@pytest.mark.parametrize(("precision", "lowest"), [("fp16", "8.0"), ("fp8", "8.9")])
def test_portable_plans_begin_where_their_types_do(tmp_path: Path, precision: str, lowest: str) -> None:
    device = BuildDevice("tensorrt_rtx", ("8.0",), portable=True)
    request = EngineRequest(device, PROFILES, hardware_compatible=True)
    report = build(Decoder(precision, layers=1).model(), tmp_path, request)
    assert report.compute_capabilities == (lowest,) and report.flags == ["hardware_compatible"]
    assert report.requirements["hardware_compatible"] is True


def test_progress_rises_to_the_end(tmp_path: Path) -> None:
    told: list[float] = []
    build_plan(save(Decoder().model(), tmp_path), SM89, tmp_path / "p", lambda fraction, detail: told.append(fraction))
    assert told == sorted(told) and len(told) > 20 and 0.5 < told[-1] <= 1


@pytest.mark.parametrize(
    ("fault", "kind", "node", "reason"),
    [
        ("softcap", "tensorrt.parser", "layers.1.attention (Attention)", "softcap is not supported"),
        ("float32 attention", "tensorrt.builder", "layers.1.attention (Attention)", "not supported by a dedicated"),
        ("unknown operator", "tensorrt.parser", "mixed (HadamardLinear)", "no operator HadamardLinear"),
        ("asymmetric codes", "tensorrt.parser", "asymmetric.quantize (QuantizeLinear)", "Non-zero zero point"),
    ],
)
def test_planted_faults_are_named(tmp_path: Path, fault: str, kind: str, node: str, reason: str) -> None:
    model = Decoder().model()
    FAULTS[fault](model)
    with pytest.raises(UnsupportedError) as refused:
        build(model, tmp_path)
    error = refused.value
    assert (error.kind, error.exit_code) == (kind, 3)
    assert f"node {node}" in error.message and reason in error.message and error.remedy
    assert "/_src/" not in error.message and "Error Code" not in error.message
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_a_type_that_the_gpu_lacks(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as refused:
        build(Decoder("fp8").model(), tmp_path, request_for("8.6"))
    assert "for SM86: node layers.0.q.matmul (MatMul)" in refused.value.message
    assert "fp8_e4m3" in refused.value.message


def test_a_head_too_wide(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"layers\.0\.attention \(Attention\)"):
        build(Decoder(layers=1, head_dim=512).model(), tmp_path)


def test_weights_that_are_missing(tmp_path: Path) -> None:
    model = save(Decoder(layers=1).model(), tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(UnsupportedError, match=r"model\.onnx\.data"):
        build_plan(model, SM89, tmp_path / "engine.plan", ignore)


def test_ctrl_c_ends_the_compiler_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def remembered(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        workers.append(start(*arguments, **options))  # type: ignore[call-overload]
        return workers[-1]

    monkeypatch.setattr(builder.subprocess, "Popen", remembered)
    model = save(Decoder().model(), tmp_path)
    # Tests that a shell started in the background inherit an ignored signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_plan(model, SM89, tmp_path / "engine.plan", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "engine.plan").exists()
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL]


def test_a_crash_of_the_compiler_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crash.py").write_text("import os, sys\nprint('boom', file=sys.stderr, flush=True)\nos.abort()\n")
    monkeypatch.setattr(builder, "WORKER", "crash")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UnsupportedError) as refused:
        build(Decoder(layers=1).model(), tmp_path)
    assert refused.value.kind == "tensorrt.crashed"
    assert "signal 6" in refused.value.message and "boom" in refused.value.message


def test_a_fault_of_our_own_keeps_its_trace(tmp_path: Path) -> None:
    """No device that `resolve_device` gives has such a capability."""
    request = EngineRequest(BuildDevice("tensorrt_rtx", ("unheard of",)), PROFILES)
    with pytest.raises(RuntimeError, match="Traceback"):
        build(Decoder(layers=1).model(), tmp_path, request)
    assert not (tmp_path / "engine.plan").exists()


def test_modules_in_the_current_directory_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *filter(None, sys.path)])
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong module')\n")
    assert build(Decoder(layers=1).model(), tmp_path).plan_bytes > 0


PARENT = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-m", sys.argv[1], "1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
worker.stdin.write(sys.stdin.buffer.read())
worker.stdin.flush()
print(worker.pid, flush=True)
worker.wait()
"""


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    save(Decoder().model(), tmp_path)
    request = json.dumps(SM89.to_json())
    job = {"model": "model.onnx", "out": "engine.plan", "request": request}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, builder.WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write(json.dumps(job).encode() + b"\n")
        parent.stdin.close()
        worker = psutil.Process(int(parent.stdout.readline()))
        while not _builds(worker):
            time.sleep(0.01)
        parent.kill()
    assert psutil.wait_procs([worker], timeout=30)[1] == []


def _builds(worker: psutil.Process) -> bool:
    """Whether it has taken its job and loaded the compiler."""
    return any("tensorrt" in part.path for part in worker.memory_maps())
