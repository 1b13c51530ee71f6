"""The built wheel, installed in another directory: complete, typed, and light to import."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("exporter", "calibration", "targets", "enginesmith", "pyproject.toml", "README.md", "LICENSE")
HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "onnxscript")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build directory left in the checkout would add files that are gone by now."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip(["wheel", str(source), "--wheel-dir", str(out), "--no-deps", "--no-build-isolation"])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip(["install", str(wheel), "--target", str(target), "--no-deps", "--no-compile"])
    return target


def pip(arguments: list[str]) -> None:
    # No index: whatever is missing must not be fetched in the middle of a test.
    command = [sys.executable, "-m", "pip", *arguments, "--no-index", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_outside(installed: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python in another directory with the installed wheel first on the path (-P: without that directory)."""
    elsewhere = installed.parent
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for package in ("exporter", "calibration", "targets")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert not expected - held
    assert "enginesmith/__init__.py" in held and "enginesmith/py.typed" in held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert not [name for name in held if name.startswith(("tests/", "examples/", "docs/"))]


def test_import_is_light_and_comes_from_the_wheel(installed: Path) -> None:
    code = (
        "import sys, enginesmith, exporter.core.errors\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "print(enginesmith.__file__, exporter.core.errors.__file__, sep='\\n')\n"
    )
    done = run_outside(installed, ["-c", code])
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(installed) for line in done.stdout.splitlines())


def test_every_public_name_resolves(installed: Path) -> None:
    code = "import enginesmith\nfor name in enginesmith.__all__:\n    getattr(enginesmith, name)\n"
    done = run_outside(installed, ["-c", code])
    assert done.returncode == 0, done.stderr


def test_command_prints_help(installed: Path) -> None:
    done = run_outside(installed, ["-m", "exporter", "--help"])
    assert done.returncode == 0, done.stderr
    assert "build" in done.stdout


def test_engine_is_built_then_loaded_and_run_without_torch(
    installed: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    engine, source = str(tmp_path / "engine"), str(tiny_checkpoint("gqa"))
    build = f"import enginesmith\nenginesmith.build({source!r}, target='onnxruntime', recipe='fp32', out={engine!r})\n"
    done = run_outside(installed, ["-c", build])
    assert done.returncode == 0, done.stderr
    run = (
        "import sys, enginesmith\n"
        f"with enginesmith.load({engine!r}) as engine:\n"
        "    assert 1 <= len(engine.generate('def main', max_new_tokens=4).output_ids) <= 4\n"
        "loaded = [name for name in ('torch', 'transformers', 'onnx', 'onnx_ir') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = run_outside(installed, ["-c", run])
    assert done.returncode == 0, done.stderr
