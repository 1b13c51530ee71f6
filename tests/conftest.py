"""Settings and fixtures that every room's tests share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before torch, transformers or tokenizers are imported. One thread each: pytest-xdist already uses every core.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TQDM_DISABLE="1",
)

CheckpointFactory = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def quiet_onnxruntime() -> None:
    """Only errors of ONNX Runtime are shown: its warnings about unusual graphs are not about our code."""
    try:
        import onnxruntime
    except ImportError:
        return
    onnxruntime.set_default_logger_severity(3)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """`tiny_checkpoint("gqa", **changes)`: a directory written once per session by `write_checkpoint`.

    Directories are shared between tests: copy one before changing it.
    """
    written: dict[tuple[str, str], Path] = {}

    def factory(shape: str = "gqa", **changes: Any) -> Path:
        key = (shape, repr(sorted(changes.items(), key=lambda item: item[0])))
        if key not in written:
            from tests.support.tiny import write_checkpoint

            out = tmp_path_factory.mktemp(f"{shape}-", numbered=True)
            written[key] = write_checkpoint(out, shape, **changes)
        return written[key]

    return factory
