"""`enginesmith calibrate` from its arguments to its file, its JSON and its exit codes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.qparams import QParams
from calibration.transforms import RotateResidual
from exporter.cli.main import run
from exporter.core.checkpoint import Checkpoint
from tests.cli.command import enginesmith

TEXT = "".join(f"def number_{i}(x):\n    return x + {i}\n" for i in range(300))
SMALL = ["--calibration-tokens", "128", "--calibration-length", "32", "--threads", "1", "--json"]


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command line in this process: exit code, stdout, stderr."""
    try:
        code = run([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = int(exit.code or 0)
    captured = capfd.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_parameters_are_written_and_described(
    capfd: pytest.CaptureFixture[str], tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    path, out = tiny_checkpoint("gqa"), tmp_path / "q.qparams"
    arguments = ["calibrate", str(path), "--recipe", "int4-gptq", "--calibration", str(text), "--out", str(out), *SMALL]
    code, printed, errors = call(capfd, *arguments, "--rotate", "--seed", "7", "--progress", "plain")
    assert code == 0, errors
    result = json.loads(printed)
    found = QParams.open(out)
    found.check(Checkpoint.open(path))
    assert result["digest"] == found.digest and result["bytes"] == out.stat().st_size
    assert result["recipe"] == "int4-gptq" and result["algorithms"] == ["rotate", "gptq"]
    assert result["data"]["tokens"] == 128 and result["data"]["seed"] == 7
    assert "gptq_damping" in result["reports"]["model.layers.1.mlp.down_proj"]
    assert found.transforms[1] == RotateResidual(7)
    assert "100% calibrate" in errors

    # A command line of its own: the first has redirected this process's standard output.
    again = enginesmith(*arguments)
    assert again.code == 2 and again.json["error"]["kind"] == "output.exists"
    before = out.read_bytes()
    assert enginesmith(*arguments, "--rotate", "--seed", "7", "--force").code == 0
    assert out.read_bytes() == before


def test_chats_go_through_the_checkpoints_template(
    capfd: pytest.CaptureFixture[str], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    chats = tmp_path / "chats.jsonl"
    message = {"role": "user", "content": TEXT[:2000]}
    chats.write_text(json.dumps({"messages": [message]}) + "\n", encoding="utf-8")
    path, out = tiny_checkpoint("gqa"), tmp_path / "q"
    arguments = ["calibrate", "--recipe", "fp8", "--calibration", str(chats), "--out", str(out), *SMALL]
    code, printed, errors = call(capfd, *arguments, str(path))
    assert code == 0, errors
    assert json.loads(printed)["data"]["format"] == "chat"
    silent = tmp_path / "silent"
    shutil.copytree(path, silent)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (silent / name).unlink(missing_ok=True)
    refused = enginesmith(*arguments, silent, "--force")
    assert refused.code == 2 and refused.json["error"]["kind"] == "data.chat_template"


@pytest.mark.parametrize(
    ("options", "code", "kind"),
    [
        (["--recipe", "int4-gptq"], 2, "recipe.needs_data"),
        (["--recipe", "int4-rtn"], 2, "calibrate.nothing"),
        (["--recipe", "int4-rtn", "--kv-cache", "fp8"], 2, "recipe.needs_data"),
        (["--recipe", "nothing"], 2, "recipe.unknown"),
        (["--recipe", "fp8", "--rotate", "--calibration", "TEXT"], 2, "recipe.algorithms"),
        (["--recipe", "int4-gptq", "--calibration", "missing.txt"], 2, "data.unreadable"),
        (["--recipe", "int4-gptq", "--calibration", "TEXT", "--group-size", "256"], 6, "coverage.missed"),
        (["--recipe", "int4-gptq", "--calibration", "TEXT", "--max-ram", "10M"], 6, "memory.calibrate"),
        (["--recipe", "int4-gptq", "--calibration", "TEXT", "--target-bits", "4.5"], 2, "usage.goal"),
        (["--recipe", "auto", "--calibration", "TEXT"], 2, "usage.goal"),
        (["--recipe", "auto", "--calibration", "TEXT", "--target-bits", "6", "--lm-head", "bf16"], 2, "usage.auto"),
        (["--recipe", "int4-gptq", "--calibration", "TEXT", "--calibration-length", "0"], 2, "data.tokens"),
        (["--recipe", "int4-gptq", "--calibration", "TEXT", "--calibration-tokens", "0"], 2, "usage.calibration"),
        (["--recipe", "int4-gptq", "--calibration", "TEXT", "--out", "."], 2, "output.directory"),
        (["--recipe", "int4-gptq", "--calibration", "TEXT", "--out", "no/such/place"], 2, "output.missing"),
    ],
)
def test_refused(
    capfd: pytest.CaptureFixture[str],
    tiny_checkpoint: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    options: list[str],
    code: int,
    kind: str,
) -> None:
    given = [str(text) if option == "TEXT" else option for option in options]
    out = [] if "--out" in given else ["--out", str(tmp_path / "q")]
    found, printed, _ = call(capfd, "calibrate", str(tiny_checkpoint("gqa")), *given, *out, "--json")
    assert (found, json.loads(printed)["error"]["kind"]) == (code, kind)
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


def test_auto_names_the_widths_that_none_of_its_groups_divides(
    capfd: pytest.CaptureFixture[str], tiny_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    path = tiny_checkpoint("gqa", intermediate_size=200)
    out = ["--out", str(tmp_path / "q"), "--calibration", str(text), "--target-bits", "6", *SMALL]
    code, printed, _ = call(capfd, "calibrate", path, "--recipe", "auto", *out)
    error = json.loads(printed)["error"]
    assert (code, error["kind"]) == (6, "coverage.missed") and "mlp.down_proj (K=200" in error["message"]
