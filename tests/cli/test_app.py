"""Usage, refusals and lists: everything the command line says without building anything."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.cli.main import run
from tests.cli.command import enginesmith

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "stdlib-llama")
COMMANDS = ("build", "plan", "verify", "inspect", "run", "bench", "compare", "targets", "recipes", "doctor")


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command line in this process: exit code, stdout, stderr."""
    try:
        code = run([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = int(exit.code or 0)
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_help_lists_every_command_of_the_contract(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "--help")
    assert code == 0
    assert [name for name in COMMANDS if f"\n  {name} " not in out] == []


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["nonsense"], 2, "usage"),
        (["build", "x"], 2, "usage"),
        (["plan", "x", "--target", "onnxruntime", "--recpe", "fp32"], 2, "usage.option"),
        (["plan", EXAMPLE, "--target", "onnxruntime", "--tp", "2"], 3, "target.option"),
        (["plan", EXAMPLE, "--target", "tvm", "--format", "hf"], 3, "target.option"),
        (["plan", "x", "--target", "tensorrt-llm", "--tp", "0"], 2, "usage.engine"),
        (["plan", "x", "--target", "onnxruntime", "--labels=f"], 2, "usage.labels"),
        (["plan", "x", "--target", "tvm", "--calibration-tokens", "9"], 2, "usage.calibration"),
        (["plan", "x", "--target", "tvm", "--calibration", "f", "--calibration-tokens", "0"], 2, "usage.calibration"),
        (["plan", "x", "--target", "tvm", "--qparams", "f", "--calibration", "g"], 2, "usage.qparams"),
        (["plan", "x", "--target", "tvm", "--qparams", "f", "--rotate"], 2, "usage.qparams"),
        (["plan", "x", "--target", "tvm", "--target-bits", "4", "--max-kl", "0.1"], 2, "usage.goal"),
        (["plan", "x", "--target", "tvm", "--target-bits", "-4"], 2, "usage.goal"),
        (["plan", EXAMPLE, "--target", "tvm", "--recipe", "int4-rtn", "--target-bits", "4"], 2, "usage.goal"),
        (["plan", EXAMPLE, "--target", "tvm", "--recipe", "auto"], 2, "usage.goal"),
        (["plan", EXAMPLE, "--target", "tvm", "--recipe", "int4-rtn", "--calibration", "f"], 2, "usage.calibration"),
        (["plan", EXAMPLE, "--target", "tvm", "--recipe", "bf16", "--rotate"], 2, "recipe.algorithms"),
        (["build", EXAMPLE, "--target", "tvm", "--out", "y", "--recipe", "int4-gptq"], 2, "recipe.needs_data"),
        (["build", EXAMPLE, "--target", "onnxruntime", "--out", "y", "--kv-cache", "int8"], 2, "recipe.needs_data"),
        (["plan", EXAMPLE, "--target", "tvm", "--qparams", "no-such-file"], 2, "qparams.missing"),
        (["plan", "x", "--target", "onnxruntime", "--task", "classify"], 2, "usage.labels"),
        (["plan", "x", "--target", "onnxruntime", "--task", "sing"], 2, "usage.task"),
        (["plan", "x", "--target", "onnxruntime"], 2, "checkpoint.missing"),
        (["plan", "x", "--target", "coreml"], 3, "target.unknown"),
        (["plan", EXAMPLE, "--target", "onnxruntime", "--device", "graviton3"], 3, "target.device"),
        (["plan", EXAMPLE, "--target", "onnxruntime", "--mattr=+avx2"], 3, "target.device"),
        (["build", EXAMPLE, "--target", "onnxruntime", "--out", "y", "--tune", "5"], 3, "target.device"),
        (["build", EXAMPLE, "--target", "onnxruntime", "--out", "y", "--tuning", "t.json"], 3, "target.device"),
        (["plan", EXAMPLE, "--target", "tvm", "--device", "raspberry-pi-9"], 2, "device.unknown"),
        (["plan", EXAMPLE, "--target", "tvm", "--mcpu", "pentium"], 2, "device.mcpu"),
        (["plan", EXAMPLE, "--target", "tvm", "--mtriple", "riscv64-linux-gnu"], 3, "device.mtriple"),
        (["plan", "x", "--target", "tvm", "--device", "host", "--mcpu", "znver4"], 2, "usage.device"),
        (["build", "x", "--target", "tvm", "--out", "y", "--tune", "-1"], 2, "usage.tune"),
        (["plan", EXAMPLE, "--target", "onnxruntime", "--kv-cache", "fp16"], 3, "target.onnxruntime"),
        (["plan", EXAMPLE, "--target", "tvm", "--kv-cache", "fp8"], 3, "target.tvm"),
        (["plan", EXAMPLE, "--target", "tvm", "--kv-cache", "int3"], 2, "recipe.kv_cache"),
        (["build", "x", "--target", "tvm", "--out", "y", "--no-parity", "--report", "r.html"], 2, "usage.report"),
        (["plan", "x", "--target", "onnxruntime", "--max-batch", "0"], 2, "usage.max_batch"),
        (["build", "x", "--target", "onnxruntime", "--out", "y", "--tracer", "z"], 2, "usage.tracer"),
        (["build", "x", "--target", "onnxruntime", "--out", "y", "--max-ram", "much"], 2, "usage.size"),
        (["build", "x", "--target", "onnxruntime", "--out", "y", "--progress", "loud"], 2, "usage.progress"),
        (["calibrate", "x"], 2, "usage"),
        (["inspect", "no-such-engine"], 2, "artifact.not_found"),
        (["run", "no-such-engine"], 2, "usage.prompt"),
        (["run", "no-such-engine", "--prompt-ids", "1,b"], 2, "usage.prompt_ids"),
        (["bench", "no-such-engine", "--threads", "-1"], 2, "usage"),
        (["bench", "no-such-engine", "--threads", "9999"], 2, "usage.threads"),
        (["plan", "x", "--target", "onnxruntime", "--max-batch", "1000000"], 2, "usage.max_batch"),
        # Before a weight is read, or the compiler runs; and text would not help where the GPU cannot do it.
        (["plan", EXAMPLE, "--target", "onnxruntime", "--max-seq-len", "7"], 2, "parity.too_short"),
        (["build", EXAMPLE, "--target", "onnxruntime", "--out", "y", "--max-seq-len", "7"], 2, "parity.too_short"),
        (
            ["build", EXAMPLE, "--target", "tensorrt", "--out", "y", "--recipe", "fp8", "--device", "sm80"],
            3,
            "target.tensorrt",
        ),
        (["build", EXAMPLE, "--target", "tvm", "--out", "y", "--recipe", "fp8"], 2, "recipe.needs_data"),
    ],
)
def test_failures_are_one_json_object_and_the_contracts_code(
    capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, kind: str
) -> None:
    found, out, err = call(capfd, *arguments, "--json")
    error = json.loads(out)["error"]
    assert (found, error["exit_code"], error["kind"]) == (code, code, kind)
    assert error["message"] in err and error["remedy"]
    assert "Traceback" not in err


def test_a_misspelt_option_names_the_nearest(capfd: pytest.CaptureFixture[str]) -> None:
    _, _, err = call(capfd, "plan", "x", "--target", "onnxruntime", "--recpe", "fp32")
    assert "did you mean --recipe?" in err


@pytest.mark.parametrize("command", ["targets", "recipes"])
def test_lists(capfd: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = call(capfd, command, "--json")
    entries = json.loads(out)[command]
    assert code == 0
    assert {entry["name"] for entry in entries} >= ({"onnxruntime"} if command == "targets" else {"fp32", "int4-rtn"})
    code, text, _ = call(capfd, command)
    assert code == 0
    assert all(entry["name"] in text for entry in entries)


def test_targets_list_devices_and_caches(capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capfd, "targets", "--json")
    listed = {entry["name"]: entry for entry in json.loads(out)["targets"]}
    devices = {device["name"]: device["summary"] for device in listed["tvm"]["devices"]}
    assert {"host", "raspberry-pi-5", "graviton3", "x86-64-v3", "aarch64"} <= devices.keys() and all(devices.values())
    assert listed["onnxruntime"]["devices"] == []
    caches = {"fp32": "native", "fp16": "refused", "bf16": "refused", "int8": "native", "fp8": "refused"}
    assert listed["onnxruntime"]["kv_caches"] == caches
    assert listed["tvm"]["kv_caches"] == caches | {"fp16": "native"}
    assert listed["tvm"]["default_kv_cache"]["int4-rtn"] == "fp16"
    assert listed["onnxruntime"]["default_kv_cache"]["int4-rtn"] == "fp32"
    parts = {"linear": "int4/g32", "lm_head": "int4/g32", "embedding": "int8/g32"}
    assert listed["onnxruntime"]["precisions"]["int4-rtn"] == parts
    assert listed["tvm"]["precisions"]["int4-rtn"] == {**parts, "lm_head": "int6/g32", "embedding": "int6/g32"}
    _, text, _ = call(capfd, "targets")
    assert "--device raspberry-pi-5" in text


def test_doctor_finds_what_is_installed(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "doctor", "--json")
    diagnosis = json.loads(out)
    assert code == 0 and diagnosis["usable"] is True
    checks = {check["name"]: check for check in diagnosis["checks"]}
    assert checks["build: torch"]["detail"].startswith("2.")
    assert checks["target onnxruntime"]["passed"] is True
    assert checks["gpu"]["required"] is False and checks["nvidia: polygraphy"]["required"] is False
    assert checks["threads"]["passed"] is True and "physical cores" in checks["threads"]["detail"]
    for name in ("tvm: apache-tvm", "tvm: apache-tvm-ffi", "tvm: libtvm_runtime", "tvm: ziglang", "2 MB pages"):
        assert checks[name]["required"] is False
        assert checks[name]["passed"] or checks[name]["remedy"], name


def test_plan_reads_no_weight(
    capfd: pytest.CaptureFixture[str], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("gqa")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    code, out, _ = call(capfd, "plan", tmp_path, "--target", "onnxruntime", "--recipe", "int4-rtn", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["coverage"]["fraction"] == 1.0
    assert plan["peak_ram_bytes"] == max(stage["peak_ram_bytes"] for stage in plan["stages"])
    assert 0 < plan["engine_bytes"] <= plan["disk_bytes"]


def test_plan_of_an_indivisible_width_names_the_modules(
    capfd: pytest.CaptureFixture[str], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = json.loads((tiny_checkpoint("gqa") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 136}))
    code, out, _ = call(capfd, "plan", tmp_path, "--target", "onnxruntime", "--recipe", "int4-rtn", "--json")
    plan = json.loads(out)
    assert code == 6 and plan["error"]["kind"] == "coverage.missed"
    assert "mlp.down_proj" in plan["error"]["message"]
    assert plan["coverage"]["fraction"] < 1.0
    assert [note for note in plan["unsupported"] if "layers.1.mlp.down_proj" in note]


def test_a_new_process_prints_its_version_and_bad_usage() -> None:
    assert enginesmith("--version").out.startswith("enginesmith ")
    wrong = enginesmith("build")
    assert wrong.code == 2 and wrong.out == ""
    assert wrong.err.startswith("error: ")


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_full_standard_output_is_an_answer_not_a_traceback(form: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "exporter", "recipes", *form]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert "cannot be written to standard output" in done.stderr
    assert "Traceback" not in done.stderr
