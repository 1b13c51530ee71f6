"""docs/artifact.md and docs/runtime.md name every kind of error that the code raises, and none that it does not."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_NAMES = {"tokenizer.json", "tokenizer.model"}


def kinds(paths: list[Path], pattern: str) -> set[str]:
    return {match for path in paths for match in re.findall(pattern, path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("family", ["artifact", "output", "tokenizer"])
def test_the_kinds_of_the_artifact(family: str) -> None:
    files = [*sorted((ROOT / "exporter" / "artifact").glob("*.py")), ROOT / "exporter" / "core" / "disk.py"]
    raised = kinds(files, rf'"({family}\.[a-z_0-9]+)"')
    documented = kinds([ROOT / "docs" / "artifact.md"], rf"`({family}\.[a-z_0-9]+)`")
    assert documented - FILE_NAMES == raised - FILE_NAMES


def test_the_kinds_of_running() -> None:
    raised = kinds(sorted((ROOT / "exporter" / "runtime").glob("*.py")), r'"((?:run|chat)\.[a-z_0-9]+)"')
    documented = kinds([ROOT / "docs" / "runtime.md"], r"`((?:run|chat)\.[a-z_0-9]+)`")
    assert documented == raised
