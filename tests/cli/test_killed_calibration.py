"""What a calibration leaves when it is killed, and who clears it up."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import enginesmith

TEXT = Path(__file__).parents[1] / "support" / "tiny.py"
REQUEST = ["--calibration", TEXT, "--calibration-tokens", 128, "--threads", 1, "--progress", "none"]
# The process kills itself while it works on the second layer, when the first is on the disk.
KILLED = """
import os, signal, sys
from pathlib import Path
from exporter.calibrating import CalibrationOptions, calibrate_with
from exporter.calibration_request import CalibrationRequest
from exporter.core.progress import NoProgress
from exporter.options import BuildOptions
from exporter.pipeline import build

class Killing(NoProgress):
    def advance(self, fraction, detail=""):
        if detail.startswith("layer 2"):
            os.kill(os.getpid(), signal.SIGKILL)

command, checkpoint, out, text, *work = sys.argv[1:]
request = CalibrationRequest(text=Path(text), tokens=128, work_dir=Path(work[0]) if work else None)
if command == "build":
    options = BuildOptions(Path(checkpoint), Path(out), "onnxruntime", "int4-gptq", calibration=request, threads=1)
    build(options, Killing())
calibrate_with(CalibrationOptions(Path(checkpoint), "int4-gptq", Path(out), request, threads=1), Killing())
"""


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("gqa")


def kill(command: str, checkpoint: Path, out: Path, *work: Path) -> list[str]:
    """Begin a command and kill it; what lies beside its output then, without process id and random part."""
    arguments = [sys.executable, "-c", KILLED, command, *map(str, (checkpoint, out, TEXT, *work))]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return sorted(path.name.split("-")[0] for path in out.parent.iterdir())


def calibrate(checkpoint: Path, out: Path, *more: object) -> list[str]:
    """A calibration that succeeds; what lies beside its output then."""
    result = enginesmith("calibrate", checkpoint, "--recipe", "int4-gptq", "--out", out, *REQUEST, *more)
    assert result.code == 0, result.err
    return sorted(path.name for path in out.parent.iterdir())


def test_a_killed_calibration_is_cleared_by_the_next(checkpoint: Path, tmp_path: Path) -> None:
    assert kill("calibrate", checkpoint, tmp_path / "q") == [".q.calibration"]
    assert [path.name for path in tmp_path.glob(".q.calibration-*/part-*")] == ["part-0000.qparams"]
    assert calibrate(checkpoint, tmp_path / "q") == ["q"]


def test_one_that_goes_on_elsewhere_or_only_rotates_clears_it_too(checkpoint: Path, tmp_path: Path) -> None:
    kill("calibrate", checkpoint, tmp_path / "q")
    assert calibrate(checkpoint, tmp_path / "q", "--work-dir", tmp_path / "work") == ["q", "work"]
    kill("calibrate", checkpoint, tmp_path / "r")
    rotated = ["--recipe", "int4-rtn", "--rotate", "--out", tmp_path / "r"]
    assert enginesmith("calibrate", checkpoint, *rotated).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "r", "work"]


def test_a_named_work_directory_survives(checkpoint: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert kill("calibrate", checkpoint, tmp_path / "q", work) == ["work"]
    assert (work / "part-0000.qparams").is_file()
    assert calibrate(checkpoint, tmp_path / "q", "--work-dir", work) == ["q", "work"]
    assert not list(work.iterdir())


def test_a_build_killed_while_it_calibrates_is_cleared_by_a_build_without_calibration(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "engine"
    assert kill("build", checkpoint, out) == [".engine.building", ".engine.calibration"]
    result = enginesmith("build", checkpoint, "--target", "onnxruntime", "--out", out, "--no-parity")
    assert result.code == 0, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
