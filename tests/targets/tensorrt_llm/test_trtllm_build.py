"""Compiling with `trtllm-build`: a stand-in that records its arguments, one that fails, one that will not stop."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from exporter.core.engine_options import EngineOptions
from exporter.core.errors import UnsupportedError
from exporter.core.progress import NoProgress
from targets.base import Limits
from targets.tensorrt_llm.trtllm_build import build_command, compile_engine, compiler_missing

LIMITS = Limits(8, 2048)
CUT = EngineOptions(2, 2, format="trtllm", compile_engine=True)
WRITES = """
    out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
    out.mkdir()
    for rank in range(int(sys.argv[sys.argv.index("--workers") + 1])):
        (out / f"rank{rank}.engine").write_bytes(b"engine")
    (out / "config.json").write_text("{}")
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Compiler":
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return Compiler(tmp_path)


class Compiler:
    """A `trtllm-build` of ours at the head of the path."""

    def __init__(self, path: Path) -> None:
        self.path = path / "bin" / "trtllm-build"
        self.arguments = path / "arguments"

    def does(self, body: str) -> None:
        lines = ["#!" + sys.executable, "import pathlib, signal, sys, time"]
        lines.append(f"pathlib.Path({str(self.arguments)!r}).write_text('\\n'.join(sys.argv[1:]))")
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text("\n".join(lines) + "\n" + textwrap.dedent(body))
        self.path.chmod(0o755)


def test_engines_are_compiled_with_the_limits_of_the_build(compiler: Compiler, tmp_path: Path) -> None:
    compiler.does(WRITES)
    files = compile_engine(tmp_path, LIMITS, CUT, NoProgress())
    assert files == ["engine/config.json", *(f"engine/rank{rank}.engine" for rank in range(4))]
    given = compiler.arguments.read_text().splitlines()
    assert given == build_command(tmp_path, LIMITS, CUT, tmp_path / "engine")[1:]
    options = dict(zip(given[::2], given[1::2], strict=True))
    assert options == {
        "--checkpoint_dir": str(tmp_path),
        "--output_dir": str(tmp_path / "engine"),
        "--max_batch_size": "8",
        "--max_input_len": "2048",
        "--max_seq_len": "2048",
        "--workers": "4",
    }


def test_prompts_may_be_shorter_than_rows(tmp_path: Path) -> None:
    command = build_command(tmp_path, LIMITS, EngineOptions(max_prompt=300))
    assert command[command.index("--max_input_len") + 1] == "300"
    assert command[command.index("--workers") + 1] == "1"


def test_a_compiler_that_fails_is_quoted(compiler: Compiler, tmp_path: Path) -> None:
    compiler.does("print('x' * 100000)\nprint('[TRT] out of memory', file=sys.stderr)\nsys.exit(3)")
    with pytest.raises(UnsupportedError, match="exit status 3") as caught:
        compile_engine(tmp_path, LIMITS, CUT, NoProgress())
    assert caught.value.kind == "tensorrt_llm.build" and caught.value.exit_code == 3
    assert "[TRT] out of memory" in caught.value.message
    assert "--checkpoint_dir CHECKPOINT --output_dir ENGINES" in caught.value.remedy
    assert str(tmp_path) not in caught.value.remedy, "the files of a failed build are gone"


def test_a_compiler_that_is_killed_is_told(compiler: Compiler, tmp_path: Path) -> None:
    compiler.does("import os\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(UnsupportedError, match="signal SIGKILL"):
        compile_engine(tmp_path, LIMITS, CUT, NoProgress())


def test_a_compiler_that_leaves_no_engine_behind(compiler: Compiler, tmp_path: Path) -> None:
    compiler.does("print('nothing to do')")
    with pytest.raises(UnsupportedError, match=r"wrote no engine/rank0\.engine") as caught:
        compile_engine(tmp_path, LIMITS, CUT, NoProgress())
    assert "rank3.engine" in caught.value.message and "nothing to do" in caught.value.message


def test_without_the_compiler_the_command_for_elsewhere_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = compiler_missing(LIMITS, CUT)
    assert error is not None and error.exit_code == 3
    assert "trtllm-build is not installed" in error.message
    command = (
        "trtllm-build --checkpoint_dir CHECKPOINT --output_dir ENGINES --max_batch_size 8 "
        "--max_input_len 2048 --max_seq_len 2048 --workers 4"
    )
    assert command in error.remedy and "tensorrt-llm==1.2.1" in error.remedy
    with pytest.raises(UnsupportedError, match="not installed"):
        compile_engine(tmp_path, LIMITS, CUT, NoProgress())


STUBBORN = """
    import subprocess
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sleeper = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"
    worker = subprocess.Popen([sys.executable, "-c", sleeper])
    pathlib.Path(sys.argv[0] + ".pids").write_text(f"{__import__('os').getpid()} {worker.pid}")
    time.sleep(600)
"""
CALLER = """
import signal
import sys
from pathlib import Path
from exporter.core.engine_options import PLAIN
from exporter.core.progress import NoProgress
from targets.base import Limits
from targets.tensorrt_llm import trtllm_build
# What a shell started in the background has inherited an ignored signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
trtllm_build.PATIENCE_S = 0.2
trtllm_build.compile_engine(Path(sys.argv[1]), Limits(1, 16), PLAIN, NoProgress())
"""


def test_an_interrupt_ends_a_compiler_that_will_not_stop(compiler: Compiler, tmp_path: Path) -> None:
    compiler.does(STUBBORN)
    caller = subprocess.Popen([sys.executable, "-c", CALLER, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    told = Path(f"{compiler.path}.pids")
    while not told.exists() or not told.read_text():
        assert caller.poll() is None, caller.communicate()[1]
        time.sleep(0.05)
    caller.send_signal(signal.SIGINT)
    _, said = caller.communicate()
    assert "KeyboardInterrupt" in said
    for pid in map(int, told.read_text().split()):
        assert not runs(pid)


def runs(pid: int) -> bool:
    """Whether a process is there and is not a zombie whose new parent has yet to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
