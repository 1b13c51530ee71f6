"""Builds through the command line: artifacts, verdicts, and nothing left behind when a build ends early."""

import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

from exporter.core.machine import cpu_features, triple
from targets.tvm.devices import DEVICES
from tests.cli.command import Result, enginesmith

Factory = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Factory) -> Path:
    return tiny_checkpoint("gqa", gain=0.5)


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """An int4 engine of the tiny model, built with parity, JSON progress and a report."""
    folder = tmp_path_factory.mktemp("built")
    result = enginesmith(
        *("build", checkpoint, "--target", "onnxruntime", "--recipe", "int4-rtn", "--out", folder / "engine"),
        *("--report", folder / "report.html", "--progress", "jsonl", "--json"),
    )
    assert result.code == 0, result.err
    return folder / "engine", result


def test_build_reports_what_it_made(built: tuple[Path, Result]) -> None:
    engine, result = built
    outcome = result.json
    assert outcome["path"] == str(engine)
    assert outcome["parity"]["passed"] is True
    proof = outcome["proof"]
    assert proof["graph_parity"] is proof["engine_run"] is proof["simulation"] is True and proof["stand_in"] is None
    assert (
        proof["built_by"].startswith("onnxruntime")
        and proof["statement"] == f"built by {proof['built_by']} and run here"
    )
    assert outcome["coverage"]["fraction"] == 1.0
    names = {check["name"] for check in outcome["parity"]["checks"]}
    assert names >= {
        *("relative_l2_error", "kl_divergence_mean", "kl_divergence_max", "perplexity_ratio", "top1_agreement"),
        *("decode_vs_prefill", "ragged_batch_vs_single", "long_position"),
    }


def test_progress_lines_are_json_and_reach_the_end(built: tuple[Path, Result]) -> None:
    lines = [json.loads(line) for line in built[1].err.splitlines() if line.startswith("{")]
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    assert stages == ["check", "trace", "fuse", "quantize", "compile", "verify", "package"]
    fractions = [line["fraction"] for line in lines]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert {"elapsed_seconds", "remaining_seconds", "stage_fraction", "detail"} <= lines[0].keys()


def test_report_is_one_self_contained_page(built: tuple[Path, Result]) -> None:
    page = (built[0].parent / "report.html").read_text(encoding="utf-8")

    class Resources(HTMLParser):
        found: list[str]

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.found += [v for k, v in attributes if k in ("src", "href") and v and not v.startswith(("#", "data:"))]

    parser = Resources()
    parser.found = []
    parser.feed(page)
    assert parser.found == []
    assert "kl_divergence_mean" in page and "<svg" in page


def test_commands_on_the_engine(built: tuple[Path, Result], checkpoint: Path) -> None:
    engine, _ = built
    verified = enginesmith("verify", engine, "--against", checkpoint, "--json").json
    assert verified["passed"] is True and verified["target"] == "onnxruntime"
    seen = enginesmith("inspect", engine, "--for-host", "--json").json
    assert seen["fits_host"] is True and seen["digest"] == built[1].json["digest"]
    answer = enginesmith("run", engine, "--prompt-ids", "5,6,7", "--max-new-tokens", "4", "--json").json
    assert answer["prompt_ids"] == [5, 6, 7] and len(answer["output_ids"]) <= 4
    bench = enginesmith("bench", engine, "--prompt-tokens", "16", "--new-tokens", "8", "--json").json
    assert bench["decode_tokens_per_s"] > 0 and bench["batch"] == 1
    rows = enginesmith("compare", engine, "--against", checkpoint, "--json").json["engines"]
    assert rows[0]["passed"] is True and rows[0]["engine_bytes"] == seen["engine_bytes"]


def test_a_reader_that_has_enough_is_no_failure(built: tuple[Path, Result]) -> None:
    command = [sys.executable, "-m", "exporter", "run", str(built[0]), "--prompt-ids", "5", "--max-new-tokens", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 0


def test_a_report_of_verify_hashes_the_engine_once(
    built: tuple[Path, Result], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter import api
    from exporter.artifact import load

    hashed: list[Path] = []
    damaged_files = load.damaged_files

    def count(path: Path, *more: object) -> list[str]:
        hashed.append(path)
        return damaged_files(path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(load, "damaged_files", count)
    assert api.verify(built[0], against=checkpoint, report=tmp_path / "report.html").passed
    assert hashed == [built[0]]
    assert "decode_tokens_per_s" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_expected_digest(built: tuple[Path, Result]) -> None:
    digest = built[1].json["digest"]
    assert enginesmith("inspect", built[0], "--expect-digest", digest).code == 0
    other = enginesmith("run", built[0], "--prompt", "x", "--expect-digest", "0" * 64, "--json")
    assert other.code == 5 and other.json["error"]["kind"] == "artifact.expect_digest"


def test_verify_refuses_another_checkpoint(built: tuple[Path, Result], tiny_checkpoint: Factory) -> None:
    result = enginesmith("verify", built[0], "--against", tiny_checkpoint("mha"), "--json")
    assert result.code == 2 and result.json["error"]["kind"] == "verify.other_checkpoint"


def test_two_builds_write_the_same_bytes(built: tuple[Path, Result], checkpoint: Path, tmp_path: Path) -> None:
    again = enginesmith(
        *("build", checkpoint, "--target", "onnxruntime", "--recipe", "int4-rtn", "--out", tmp_path / "engine"),
        *("--threads", "1", "--json"),
    )
    assert again.json["digest"] == built[1].json["digest"]


def test_an_engine_for_another_machine(checkpoint: Path, tmp_path: Path) -> None:
    """Built and proven here as far as that goes; it says so, and is refused where it cannot run."""
    pytest.importorskip("tvm")
    device = "raspberry-pi-5" if platform.machine() == "x86_64" else "x86-64-v3"
    built = enginesmith(
        *("build", checkpoint, "--target", "tvm", "--device", device, "--recipe", "int4-rtn", "--kv-cache", "int8"),
        *("--max-seq-len", "64", "--out", tmp_path / "engine", "--report", tmp_path / "report.html", "--json"),
    )
    assert built.code == 0, built.err
    assert built.json["parity"]["passed"] is False and built.json["proof"]["engine_run"] is None
    assert built.json["proof"]["graph_parity"] is True
    assert "was built for" in built.json["parity"]["facts"]["engine_not_run"]
    assert "of the engine not checked" in (tmp_path / "report.html").read_text()
    manifest = enginesmith("inspect", tmp_path / "engine", "--json").json["manifest"]
    assert manifest["recipe"]["kv_cache"] == "int8"
    assert manifest["triple"] == ("aarch64-linux" if device == "raspberry-pi-5" else "x86_64-linux")
    assert ("asimddp" if device == "raspberry-pi-5" else "avx2") in manifest["requirements"]["cpu_features"]
    for command in (
        ("verify", tmp_path / "engine", "--against", checkpoint),
        ("run", tmp_path / "engine", "--prompt-ids", "1"),
        ("inspect", tmp_path / "engine", "--for-host"),
    ):
        refused = enginesmith(*command, "--json")
        assert refused.code == 5 and refused.json["error"]["kind"] == "artifact.host"
        assert refused.json["error"]["remedy"]


def test_an_engine_for_a_newer_cpu_names_the_missing_feature(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    lacking = next(
        (device for device in DEVICES.values() if device.triple == triple() and device.foreign),
        None,
    )
    if lacking is None:
        pytest.skip("this CPU runs engines for every device of its kind")
    result = enginesmith(
        *("build", checkpoint, "--target", "tvm", "--device", lacking.name, "--max-seq-len", "64", "--no-parity"),
        *("--out", tmp_path / "engine"),
    )
    assert result.code == 0, result.err
    refused = enginesmith("run", tmp_path / "engine", "--prompt-ids", "1", "--json")
    assert refused.code == 5
    missing = set(lacking.cpu_features) - cpu_features()
    assert missing and all(feature in refused.json["error"]["message"] for feature in missing)


def test_output_exists(built: tuple[Path, Result], checkpoint: Path) -> None:
    before = (built[0] / "manifest.json").read_bytes()
    result = enginesmith("build", checkpoint, "--target", "onnxruntime", "--out", built[0], "--json")
    assert result.code == 2 and result.json["error"]["kind"] == "output.exists"
    assert (built[0] / "manifest.json").read_bytes() == before


def test_a_failed_gate_leaves_nothing_but_the_report(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    """Large random weights lose more to four bits than the recipe allows: an honest failure."""
    result = enginesmith(
        *("build", tiny_checkpoint("gqa", gain=2.5), "--target", "onnxruntime", "--recipe", "int4-rtn"),
        *("--out", tmp_path / "engine", "--report", tmp_path / "report.html", "--json"),
    )
    failed = result.json
    assert result.code == 4 and failed["error"]["exit_code"] == 4
    assert failed["passed"] is False and failed["first_divergence"]["stage"] == "quantize"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html"]


def test_memory_limit_is_a_budget(checkpoint: Path, tmp_path: Path) -> None:
    result = enginesmith(
        *("build", checkpoint, "--target", "onnxruntime", "--out", tmp_path / "engine", "--max-ram", "50M", "--json")
    )
    assert result.code == 6 and result.json["error"]["kind"] == "memory.forecast"
    assert list(tmp_path.iterdir()) == []


def _start_until_staging(checkpoint: Path, out: Path) -> subprocess.Popen[str]:
    """A build that has begun to write: its hidden directory is there."""
    command = [sys.executable, "-m", "exporter", "build", str(checkpoint), "--target", "onnxruntime", "--out", str(out)]
    # A shell's background job ignores Ctrl-C, and its children inherit that.
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    while process.poll() is None and not list(out.parent.iterdir()):
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(checkpoint: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = _start_until_staging(checkpoint, tmp_path / "engine")
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_is_cleared_by_the_next(checkpoint: Path, tmp_path: Path) -> None:
    process = _start_until_staging(checkpoint, tmp_path / "engine")
    process.kill()
    process.communicate(timeout=120)
    left = list(tmp_path.iterdir())
    assert [path.name.startswith(".engine.building-") for path in left] == [True]
    result = enginesmith("build", checkpoint, "--target", "onnxruntime", "--out", tmp_path / "engine", "--no-parity")
    assert result.code == 0, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
