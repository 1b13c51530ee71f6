"""docs/tvm-kernels.md: its tables and the kernel it shows are those of the code, and its snippets run."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import enginesmith
from targets.tvm.isa import PROFILES
from tests.targets.tvm.runners import open_runner

pytest.importorskip("tvm", reason="apache-tvm is not installed")
from targets.tvm.kernels.embedding import embedding_float, lookup
from targets.tvm.lower.operators import HANDLERS
from tests.targets.tvm.kernels.test_linear_int import DOT_PRODUCTS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "tvm-kernels.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def rows(first_column: str) -> list[list[str]]:
    """Cells of the table whose first heading this is."""
    match = re.search(rf"^\| {first_column} \|.*\n\|[-|]+\|\n((?:\|.*\|\n)+)", PAGE, re.MULTILINE)
    assert match is not None
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in match[1].splitlines()]


def test_profiles_are_those_of_the_code() -> None:
    features: dict[str, list[str]] = {}
    for cells, isa in zip(rows("profile"), PROFILES.values(), strict=True):
        answers = {True: "yes", False: "no"}
        described = [f"`{isa.name}`", str(isa.lanes), str(isa.registers), answers[isa.fma], answers[isa.half]]
        assert [cells[0], *cells[2:6]] == described
        assert DOT_PRODUCTS[isa.dot] in cells[1]
        features[isa.name] = list(isa.cpu_features)
    for cells in rows("profile"):
        inherited = re.match(r"those of `([\w-]+)`, ", cells[6])
        own = cells[6].removeprefix(inherited[0] if inherited else "").split()
        assert sorted([*(features[inherited[1]] if inherited else []), *own]) == sorted(features[cells[0].strip("`")])


def test_every_operator_is_listed() -> None:
    listed = {name for cells in rows("operator") for name in cells[0].split(", ")}
    assert listed == set(HANDLERS)


def test_the_kernel_shown_is_ours() -> None:
    assert f"{inspect.getsource(embedding_float)}\n\n{inspect.getsource(lookup)}" in SNIPPETS


def test_tests_and_files_it_names_exist() -> None:
    folders = [ROOT / "targets" / "tvm", ROOT / "tests" / "targets" / "tvm"]
    folders += [folder / name for folder in folders for name in ("kernels", "lower")]
    named = set(re.findall(r"`([\w/]+\.(?:py|c))`", PAGE))
    assert named
    assert not [name for name in named if not any((folder / name).is_file() for folder in folders)]


def test_a_kernel_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = (each for each in SNIPPETS if "inspect_source" in each)
    exec(snippet, {})
    printed = capsys.readouterr().out
    assert "def embedding(" in printed and "embedding_compute_:" in printed


def test_calls_are_timed(tvm_engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    built = tvm_engine("gqa", "int4", "fp16")

    @contextmanager
    def load(path: str) -> Iterator[SimpleNamespace]:
        with open_runner(built) as runner:
            ids, lengths = np.array([[1, 2, 3]]), np.array([3])
            yield SimpleNamespace(runner=runner, generate=lambda *_, **__: runner.prefill(ids, lengths))

    monkeypatch.setattr(enginesmith, "load", load, raising=False)
    (snippet,) = (each for each in SNIPPETS if "set_instrument" in each)
    exec(snippet, {})
    names = re.findall(r"ms  (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert {"embed", "layer", "head"} <= set(names)
    assert {re.sub(r"_\d+$", "", name) for name in names} >= {
        "norm_quantize",
        "linear_int",
        "rotary_cache",
        "attention",
    }
