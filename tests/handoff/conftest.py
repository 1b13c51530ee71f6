"""Two engines with their hand-off, built once for all tests of the room."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.handoff.engines import write_classifier, write_engine


@pytest.fixture(scope="session")
def generator(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    return write_engine(tiny_checkpoint("gqa"), tmp_path_factory.mktemp("engines") / "generator")


@pytest.fixture(scope="session")
def classifier(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    return write_classifier(tiny_checkpoint("gqa"), tmp_path_factory.mktemp("engines") / "classifier")
