"""What is looked at before kernels are compiled."""

import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("tvm", reason="apache-tvm is not installed: nothing can be compiled")

from exporter.core.errors import InputError
from targets.tvm.compile import OBJECT_BYTES
from tests.targets.tvm.builds import build_tvm, tvm_source


def test_no_room_for_temporary_files_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    """LLVM would end the process."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=OBJECT_BYTES - 1))
    with pytest.raises(InputError, match="no space left") as error:
        build_tvm(tvm_source(tiny_checkpoint("gqa"), "fp32"), tmp_path / "engine")
    assert error.value.kind == "output.full" and "$TMPDIR" in error.value.remedy
