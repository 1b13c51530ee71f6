"""Tests on a GPU are skipped without one, with the reason. `make test-gpu` runs them, and there they fail instead: what
was not run is not to look as if it had passed."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

from exporter.core.errors import EngineSmithError
from exporter.core.gpu import HostGpu, gpu_host
from targets.tensorrt.toolkit import Toolkit, find_toolkit
from tests.gpu.building import Build, Tried, candidates, describe, try_builds
from tests.targets.tensorrt.contract_engines import ContractEngine, contract_engine

REQUIRED = "ENGINESMITH_REQUIRE_GPU"


def missing(reason: str) -> NoReturn:
    if os.environ.get(REQUIRED):
        pytest.fail(reason)
    pytest.skip(reason)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU and TensorRT or TensorRT-RTX")


@pytest.fixture(scope="session")
def gpu() -> HostGpu:
    host = gpu_host()
    if not host.gpus:
        missing(f"no GPU: {host.describe()}")
    return host.gpus[0]


@pytest.fixture(scope="session")
def toolkit(gpu: HostGpu) -> Toolkit:
    try:
        return find_toolkit()
    except EngineSmithError as error:
        missing(error.message)


@pytest.fixture(scope="session")
def engine(gpu: HostGpu, tiny_checkpoint, tmp_path_factory) -> ContractEngine:
    """A graph written without our lowering: what runs is the runtime's matter alone."""
    return contract_engine(tiny_checkpoint("gqa", head_dim=64), tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="session")
def tried(
    gpu: HostGpu, toolkit: Toolkit, engine: ContractEngine, tmp_path_factory: pytest.TempPathFactory
) -> list[Tried]:
    """Every way to build, and whether the engine runs here: the first thing to be known of a GPU."""
    folder: Path = tmp_path_factory.mktemp("probe")
    found = list(try_builds(candidates(toolkit, gpu), engine, toolkit, folder))
    print("\n" + describe(gpu, toolkit, found))
    return found


@pytest.fixture(scope="session")
def build(gpu: HostGpu, toolkit: Toolkit, tried: list[Tried]) -> Build:
    """The first way that works."""
    working = [each.build for each in tried if not each.refused]
    if not working:
        missing(describe(gpu, toolkit, tried))
    return working[0]
