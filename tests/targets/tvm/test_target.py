"""What the target says about itself, before anything is built, and what it builds for other machines."""

import sys

import pytest

from exporter.core.errors import InputError, UnsupportedError
from exporter.core.recipe import Precision, Recipe
from exporter.core.support import Support
from targets.base import DeviceOptions
from targets.registry import get_target
from targets.tvm import target as target_module
from targets.tvm.file_names import LIBRARY

FP32 = Precision("fp32")
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


def test_probe_names_what_is_missing(monkeypatch):
    pytest.importorskip("tvm", reason="apache-tvm is not installed")
    assert get_target("tvm").probe() == Support("native")
    monkeypatch.setitem(target_module.PACKAGES, "tvm", "no-such-package")
    answer = get_target("tvm").probe()
    assert (answer.level, get_target("tvm").versions()["tvm"]) == ("refused", "")
    assert "no-such-package" in answer.why
    assert "engines built before" not in answer.why
    assert "pip install" in answer.remedy


def test_probe_says_when_engines_built_before_do_run(monkeypatch):
    pytest.importorskip("tvm", reason="apache-tvm is not installed")
    monkeypatch.setitem(target_module.PACKAGES, "onnx-ir", "no-such-package")
    assert "engines built before do run" in get_target("tvm").probe().why


def test_probe_wants_a_linker(monkeypatch):
    pytest.importorskip("tvm", reason="apache-tvm is not installed")
    monkeypatch.setattr(target_module, "can_link", lambda: False)
    answer = get_target("tvm").probe()
    assert answer.level == "refused"
    assert "ziglang" in answer.why


def test_an_fp8_cache_is_refused(tiny_checkpoint):
    from exporter.core.config import ModelConfig

    config = ModelConfig.from_directory(tiny_checkpoint("gqa"))
    for kind, level in (("fp32", "native"), ("fp16", "native"), ("int8", "native"), ("fp8", "refused")):
        assert get_target("tvm").supports(config, Recipe("r", FP32, FP32, FP32, kind)).level == level


def test_devices_are_checked_before_anything_is_built():
    target = get_target("tvm")
    assert {"host", "raspberry-pi-5", "graviton3"} <= target.devices().keys()
    target.check_options(DeviceOptions(device="raspberry-pi-5"))
    with pytest.raises(InputError, match="pdp-11"):
        target.check_options(DeviceOptions(device="pdp-11"))


@pytest.mark.parametrize("device", ["raspberry-pi-5", "x86-64-v2"])
def test_engines_for_other_machines_are_compiled_and_linked_here(tvm_engine, device):
    pytest.importorskip("ziglang", reason="ziglang is not installed: nothing links for other machines")
    built = tvm_engine("gqa", "int4", "int8", device)
    wanted = "aarch64" if device == "raspberry-pi-5" else "x86_64"
    header = (built.path / LIBRARY).read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == ELF_MACHINES[wanted]
    assert built.result.triple == f"{wanted}-linux"
    features = built.result.requirements["cpu_features"]
    assert ("asimddp" if wanted == "aarch64" else "sse4_2") in features


def test_a_package_that_does_not_load_is_refused(monkeypatch, tiny_checkpoint, tmp_path):
    """Installed, as `probe` sees, and yet broken."""
    pytest.importorskip("tvm", reason="apache-tvm is not installed")
    from tests.targets.tvm.builds import build_tvm, tvm_source

    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(UnsupportedError) as error:
        build_tvm(tvm_source(tiny_checkpoint("gqa"), "fp32"), tmp_path / "engine")
    assert error.value.kind == "tvm.missing" and "pip install" in error.value.remedy
