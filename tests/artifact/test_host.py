"""Whether this machine fits an artifact: triples, CPU features, and every mismatch of GPUs and their runtimes."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.artifact import gpu_fit
from exporter.artifact.host import HostError, check_host
from exporter.core.gpu import GpuHost, HostGpu
from exporter.core.gpu_needs import GpuNeeds
from exporter.core.machine import cpu_features, triple

L4 = HostGpu("NVIDIA L4", "8.9", 24 * 10**9)
H200 = HostGpu("NVIDIA H200", "9.0", 150 * 10**9)
DOCS = Path(__file__).resolve().parents[2] / "docs"
A10 = HostGpu("NVIDIA A10", "8.6", 24 * 10**9)
GPU = {
    "toolkit": "tensorrt_rtx",
    "version": "1.7.1.116",
    "version_compatible": False,
    "compute_capabilities": ["8.9"],
    "hardware_compatible": False,
    "cuda": "13",
    "min_driver": "580",
    "memory_bytes": 16 * 10**9,
}
HOST = GpuHost("13.0", "580.65.06", (L4,), {"tensorrt_rtx": "1.7.1.116"})


def test_requirements_decide_whether_an_engine_fits() -> None:
    assert check_host(triple(), {"cpu_features": sorted(cpu_features())[:3]}) == []
    found = check_host(triple(), {"cpu_features": ["x99"], "npu": "v1"})
    assert [mismatch.what for mismatch in found] == ["cpu_features", "requirements"]
    assert "x99" in found[0].message and "npu" in found[1].message
    assert [mismatch.what for mismatch in check_host("riscv64-linux", {})] == ["triple"]


@pytest.mark.parametrize(
    ("needs", "host"),
    [
        ({}, HOST),
        ({"compute_capabilities": ["8.6", "8.9"]}, HOST),
        ({"compute_capabilities": ["8.0"], "hardware_compatible": True}, replace(HOST, gpus=(H200,))),
        ({"version": "1.6.0", "version_compatible": True}, HOST),
        ({}, replace(HOST, toolkits={"tensorrt_rtx": "1.7.1.116+cu13"})),
        # A driver of an older branch with NVIDIA's compatibility package serves the CUDA of a newer one.
        ({}, replace(HOST, driver="570.86.15")),
        # Nothing tells the driver's version: its CUDA decides.
        ({}, replace(HOST, driver="")),
        ({}, replace(HOST, gpus=(L4, H200))),
        ({"memory_bytes": L4.memory_bytes}, HOST),
    ],
)
def test_hosts_that_fit(needs: dict[str, Any], host: GpuHost) -> None:
    assert check_host(triple(), {"gpu": GPU | needs}, host) == []


@pytest.mark.parametrize(
    ("needs", "host", "what", "words", "remedy"),
    [
        ({}, GpuHost(toolkits=HOST.toolkits), "gpu.driver_missing", "SM89", "--gpus all"),
        ({}, replace(HOST, gpus=()), "gpu.none", "shows none", "CUDA_VISIBLE_DEVICES"),
        ({}, replace(HOST, gpus=(H200,)), "gpu.compute_capability", "SM89, this GPU is SM90", "build it again"),
        ({}, replace(HOST, gpus=(H200, L4)), "gpu.compute_capability", "SM90", "CUDA_VISIBLE_DEVICES to the GPU"),
        (
            {"compute_capabilities": ["8.9"], "hardware_compatible": True},
            replace(HOST, gpus=(A10,)),
            "gpu.compute_capability",
            "SM89 or newer, this GPU is SM86",
            "build it again",
        ),
        ({}, replace(HOST, cuda="12.8"), "gpu.cuda", "CUDA 13, the driver here serves 12.8", "driver 580"),
        ({}, replace(HOST, cuda="", driver="570.86.15"), "gpu.driver_version", "580 or newer, here is 570", "580"),
        ({"memory_bytes": 25 * 10**9}, HOST, "gpu.memory", "25.00 GB, NVIDIA L4 has 24.00 GB", "--max-batch"),
        ({}, replace(HOST, toolkits={}), "tensorrt.missing", "1.7.1.116", "enginesmith[tensorrt-rtx]"),
        (
            {"toolkit": "tensorrt", "version": "11.4.0.106"},
            replace(HOST, toolkits={}),
            "tensorrt.missing",
            "TensorRT 11.4.0.106",
            "enginesmith[tensorrt]",
        ),
        (
            {},
            replace(HOST, toolkits={"tensorrt": "11.4.0.106"}),
            "tensorrt.flavour",
            "TensorRT-RTX 1.7.1.116, here is TensorRT 11.4.0.106",
            "enginesmith[tensorrt-rtx]",
        ),
        (
            {"toolkit": "tensorrt", "version": "11.4.0.106"},
            HOST,
            "tensorrt.flavour",
            "plan of TensorRT 11.4.0.106, here is TensorRT-RTX 1.7.1.116",
            "enginesmith[tensorrt]",
        ),
        ({"version": "1.7.1.115"}, HOST, "tensorrt.version", "1.7.1.115", "install TensorRT-RTX 1.7.1.115"),
        ({"version": "1.8.0", "version_compatible": True}, HOST, "tensorrt.version", "later one", "1.8.0"),
        ({"version": "2.0", "version_compatible": True}, HOST, "tensorrt.version", "same major", "install"),
        ({"memory_bytes": "16"}, HOST, "requirements", "not written", "newer one"),
        ({"compute_capabilities": []}, HOST, "requirements", "not written", "newer one"),
        ({"toolkit": "tensorrt_dla"}, HOST, "requirements", "not written", "newer one"),
        ({"dla_cores": 2}, HOST, "requirements", "not written", "newer one"),
    ],
)
def test_one_mismatch_at_a_time(needs: dict[str, Any], host: GpuHost, what: str, words: str, remedy: str) -> None:
    found = check_host(triple(), {"gpu": GPU | needs}, host)
    assert [mismatch.what for mismatch in found] == [what]
    assert words in found[0].message and remedy in found[0].remedy


def test_all_mismatches_are_told() -> None:
    host = GpuHost("12.4", "550.54.15", (A10,), {"tensorrt_rtx": "1.6.0"})
    found = check_host(triple(), {"gpu": GPU | {"memory_bytes": 80 * 10**9}, "cpu_features": ["x99"]}, host)
    assert [mismatch.what for mismatch in found] == [
        "cpu_features",
        "tensorrt.version",
        "gpu.cuda",
        "gpu.driver_version",
        "gpu.compute_capability",
        "gpu.memory",
    ]


def test_needs_survive_being_written() -> None:
    needs = GpuNeeds.from_json(GPU)
    assert needs is not None and needs.to_json() == GPU and needs.label == "TensorRT-RTX 1.7.1.116"
    assert GpuNeeds.from_json([]) is None


def test_the_error_tells_every_mismatch() -> None:
    found = check_host(triple(), {"gpu": GPU}, GpuHost("12.4", "550.54.15", (A10,), {}))
    error = HostError(found)
    assert (error.exit_code, error.kind) == (5, "artifact.host")
    assert all(mismatch.message in error.message for mismatch in found) and len(found) == 4
    listed = error.to_json()["mismatches"]
    assert isinstance(listed, list) and listed[0]["what"] == "tensorrt.missing" and listed[0]["remedy"]


def test_the_schema_has_what_is_written() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((DOCS / "manifest.schema.json").read_text())["properties"]["requirements"]
    assert set(schema["properties"]["gpu"]["properties"]) == set(GPU)
    jsonschema.validate({"gpu": GPU}, schema)
    for wrong in ({"version": 1}, {"compute_capabilities": ["SM89"]}, {"toolkit": "tensorrt_dla"}, {"dla_cores": 2}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"gpu": GPU | wrong}, schema)


def test_the_documentation_names_every_mismatch() -> None:
    section = (DOCS / "artifact.md").read_text().split("## Engines for GPUs")[1].split("## ")[0]
    source = Path(gpu_fit.__file__).read_text()
    told = set(re.findall(r"`((?:gpu|tensorrt)\.[a-z_]+)`", section.replace("`requirements.gpu`", "")))
    assert told == set(re.findall(r'"((?:gpu|tensorrt)\.[a-z_]+)"', source))
