"""`build`, `plan`, `verify` and `compare` with quantization parameters, as users run them, and what they refuse."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import Result, enginesmith

Factory = Callable[..., Path]
TEXT = Path(__file__).parents[1] / "support" / "tiny.py"
RECIPE = """base = "int4-gptq"
algorithms = ["rotate", "gptq"]
"""


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Factory) -> Path:
    return tiny_checkpoint("tied", gain=0.3)


@pytest.fixture(scope="module")
def other(tiny_checkpoint: Factory) -> Path:
    return tiny_checkpoint("tied", gain=0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("calibrated")
    (made / "mine.toml").write_text(RECIPE)
    return made


@pytest.fixture(scope="module")
def qparams(checkpoint: Path, folder: Path) -> Path:
    path = folder / "mine.qparams"
    found = enginesmith(
        *("calibrate", checkpoint, "--recipe", folder / "mine.toml", "--calibration", TEXT, "--out", path),
        *("--calibration-tokens", 512, "--calibration-length", 64, "--json", "--progress", "none"),
    )
    assert found.code == 0, found.err
    return path


@pytest.fixture(scope="module")
def built(checkpoint: Path, qparams: Path, folder: Path) -> tuple[Path, Result]:
    engine = folder / "engine"
    result = build(checkpoint, engine, "--qparams", qparams, "--report", folder / "build.html")
    assert result.code == 0, result.err
    return engine, result


def build(checkpoint: Path, out: Path, *more: object) -> Result:
    return enginesmith(
        *("build", checkpoint, "--target", "onnxruntime", "--out", out, "--json", "--progress", "none", *more)
    )


def test_the_manifest_says_what_it_was_calibrated_on(built: tuple[Path, Result], qparams: Path) -> None:
    engine, result = built
    assert result.json["proof"]["simulation"] is True and result.json["recipe"] == "mine"
    manifest = json.loads((engine / "manifest.json").read_text())
    record = manifest["calibration"]
    assert record["algorithms"] == ["rotate", "gptq"] and record["text"]["tokens"] == 512
    assert record["transforms"] == {"FoldNorms": 1, "RotateHeads": 1, "RotateResidual": 1}
    shown = enginesmith("inspect", engine)
    assert record["qparams"][:12] in shown.out and "512 tokens" in shown.out
    page = (engine.parent / "build.html").read_text()
    assert record["qparams"] in page and record["text"]["text_sha256"] in page


def test_verify_with_and_without_the_parameters(built: tuple[Path, Result], qparams: Path, checkpoint: Path) -> None:
    engine, _ = built
    arguments = ("verify", engine, "--against", checkpoint, "--json", "--progress", "none")
    alone, whole = enginesmith(*arguments), enginesmith(*arguments, "--qparams", qparams)
    assert alone.code == whole.code == 0, alone.err + whole.err
    assert alone.json["passed"] is whole.json["passed"] is True
    assert (alone.json["proof"]["simulation"], whole.json["proof"]["simulation"]) == (None, True)
    assert any(check["passed"] is None for check in alone.json["checks"])


def test_other_parameters_are_refused(built: tuple[Path, Result], qparams: Path, checkpoint: Path) -> None:
    changed = qparams.parent / "changed.qparams"
    data = bytearray(qparams.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    arguments = ("verify", built[0], "--against", checkpoint, "--json", "--progress", "none")
    found = enginesmith(*arguments, "--qparams", changed)
    assert (found.code, found.json["error"]["kind"]) == (2, "verify.qparams")


def test_plan_says_which_matrices_are_stored(checkpoint: Path, qparams: Path) -> None:
    arguments = ("plan", checkpoint, "--qparams", qparams, "--json", "--target")
    native = enginesmith(*arguments, "onnxruntime")
    assert native.code == 0, native.err
    sources = {matrix["name"]: matrix for matrix in native.json["matrices"]}
    assert sources["model.layers.0.mlp.down_proj.weight"]["source"] == "stored"
    assert sources["model.embed_tokens.weight"]["source"] == "derived"
    assert {matrix["support"] for matrix in sources.values()} == {"native"}
    finer = enginesmith(*arguments, "onnxruntime", "--group-size", "16")
    assert {m["source"] for m in finer.json["matrices"]} == {"derived"}


def test_plan_refuses_parameters_of_another_architecture(tiny_checkpoint: Factory, qparams: Path) -> None:
    found = enginesmith("plan", tiny_checkpoint("mha"), "--target", "onnxruntime", "--qparams", qparams, "--json")
    assert (found.code, found.json["error"]["kind"]) == (2, "qparams.shape")


def test_plan_of_auto_takes_groups_that_divide_the_widths(checkpoint: Path, tiny_checkpoint: Factory) -> None:
    goal = ("--target", "onnxruntime", "--recipe", "auto", "--target-bits", 6, "--json")
    found = enginesmith("plan", checkpoint, *goal)
    assert found.code == 0, found.err
    assert "int4/g64" in {tensor["requested"] for tensor in found.json["coverage"]["tensors"]}
    uneven = tiny_checkpoint("gqa", intermediate_size=200)
    refused = enginesmith("plan", uneven, *goal)
    assert refused.code == 6 and "mlp.down_proj" in refused.err


def test_plan_of_a_recipe_that_needs_text_works_without(checkpoint: Path) -> None:
    found = enginesmith("plan", checkpoint, "--target", "onnxruntime", "--recipe", "int4-gptq", "--json")
    assert found.code == 0 and any("--calibration" in note for note in found.json["unsupported"])
    with_text = enginesmith(
        *("plan", checkpoint, "--target", "onnxruntime", "--recipe", "int4-gptq", "--calibration", TEXT, "--json")
    )
    assert with_text.json["stages"][0]["name"] == "calibrate" and with_text.json["stages"][0]["peak_ram_bytes"] > 0


def test_calibrating_within_the_build(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text() * 4)
    found = build(
        *(checkpoint, tmp_path / "engine", "--recipe", "int4-rtn", "--kv-cache", "int8"),
        *("--calibration", text, "--calibration-tokens", 1024),
    )
    assert found.code == 0, found.err
    manifest = json.loads((tmp_path / "engine" / "manifest.json").read_text())
    assert manifest["calibration"]["algorithms"] == [] and manifest["recipe"]["kv_cache"] == "int8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "text.txt"]


REFUSED = {
    "another checkpoint": (["--qparams", "{qparams}"], "other", 2, "qparams.other_checkpoint"),
    "damaged": (["--qparams", "{damaged}"], "checkpoint", 2, "qparams."),
    "another recipe": (["--qparams", "{qparams}", "--recipe", "int4-awq"], "checkpoint", 2, "qparams.recipe"),
    "no text": (["--recipe", "int8-smoothquant"], "checkpoint", 2, "recipe.needs_data"),
    "empty text": (["--recipe", "int4-gptq", "--calibration", "{empty}"], "checkpoint", 2, "data."),
    "groups": (["--qparams", "{qparams}", "--group-size", "256"], "checkpoint", 6, "coverage.missed"),
    "fp8 cache": (["--qparams", "{qparams}", "--kv-cache", "fp8"], "checkpoint", 3, "target.onnxruntime"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_leave_nothing(
    name: str, checkpoint: Path, other: Path, qparams: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    arguments, which, code, kind = REFUSED[name]
    files = tmp_path_factory.mktemp("files")
    (files / "damaged").write_bytes(qparams.read_bytes()[:200])
    (files / "empty").write_bytes(b"")
    places = {"qparams": qparams, "damaged": files / "damaged", "empty": files / "empty"}
    found = build(
        {"checkpoint": checkpoint, "other": other}[which],
        tmp_path / "engine",
        *(argument.format(**places) for argument in arguments),
    )
    error = found.json["error"]
    assert found.code == code and error["kind"].startswith(kind), error
    assert error["remedy"] and list(tmp_path.iterdir()) == []


def test_compare_shows_engines_against_each_other(built: tuple[Path, Result], checkpoint: Path, folder: Path) -> None:
    engine, page = built[0], folder / "compare.html"
    plain = folder / "plain"
    assert build(checkpoint, plain, "--recipe", "int8-weight", "--no-parity").code == 0
    found = enginesmith("compare", engine, plain, "--against", checkpoint, "--report", page, "--json")
    assert found.code == 0, found.err
    pairs = {(Path(pair["engine"]).name, Path(pair["other"]).name): pair for pair in found.json["pairs"]}
    assert pairs.keys() == {("engine", "plain"), ("plain", "engine")}
    assert all(0 < pair["kl_divergence_mean"] < 1 and pair["positions"] > 8 for pair in pairs.values())
    assert [row["held_to_simulation"] for row in found.json["engines"]] == [None, True]
    html = page.read_text()
    assert "<svg" in html and "mine" in html and "http" not in html.replace("http-equiv", "")
