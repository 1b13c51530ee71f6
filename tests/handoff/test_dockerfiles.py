"""The example Dockerfiles: read, not built."""

import json
import tomllib
from pathlib import Path

import pytest

from tests.handoff.dockerfiles import last, read_dockerfile, stages

ROOT = Path(__file__).parents[2]
FILES = ("docker/Dockerfile", "docker/tensorrt-llm.Dockerfile", "triton/Dockerfile")
OURS = ("docker/Dockerfile", "triton/Dockerfile")


@pytest.mark.parametrize("name", FILES)
def test_instructions_are_known_and_commands_are_lists(name: str) -> None:
    found = read_dockerfile(ROOT / "examples" / name)
    assert found[0].name == "FROM"
    for instruction in found:
        if instruction.name in ("CMD", "ENTRYPOINT"):
            words = json.loads(instruction.arguments)
            assert words and all(isinstance(word, str) for word in words)
    (health,) = [instruction for instruction in found if instruction.name == "HEALTHCHECK"]
    assert json.loads(health.arguments[health.arguments.index("[") :])


@pytest.mark.parametrize("name", FILES)
def test_base_images_are_pinned(name: str) -> None:
    for stage in stages(read_dockerfile(ROOT / "examples" / name)):
        _, tag = stage[0].arguments.split()[0].rsplit(":", 1)
        assert tag and tag != "latest"


@pytest.mark.parametrize("name", OURS)
def test_what_is_copied_is_there_and_makes_the_package(name: str) -> None:
    copied: set[str] = set()
    for stage in stages(read_dockerfile(ROOT / "examples" / name)):
        for instruction in stage:
            words = instruction.arguments.split()
            if instruction.name == "COPY" and not words[0].startswith("--from"):
                copied.update(words[:-1])
    assert not [path for path in copied if not (ROOT / path).exists()]
    assert {"pyproject.toml", "README.md", "LICENSE", "enginesmith", "exporter", "calibration", "targets"} <= copied


@pytest.mark.parametrize("name", OURS)
def test_the_extra_is_one_of_the_package_and_nobody_is_root(name: str) -> None:
    final = stages(read_dockerfile(ROOT / "examples" / name))[-1]
    extra = last(final, "ARG").removeprefix("EXTRA=")
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert int(last(final, "USER")) > 0


def test_the_health_check_asks_the_port_that_is_served() -> None:
    final = stages(read_dockerfile(ROOT / "examples" / "docker" / "Dockerfile"))[-1]
    assert json.loads(last(final, "CMD")) == ["--port", last(final, "EXPOSE")]
    assert "--check" in last(final, "HEALTHCHECK")


def test_what_was_not_built_says_so() -> None:
    for name in ("docker/tensorrt-llm.Dockerfile", "triton/Dockerfile"):
        assert "Not built" in (ROOT / "examples" / name).read_text()
    final = stages(read_dockerfile(ROOT / "examples" / "docker" / "tensorrt-llm.Dockerfile"))[-1]
    assert "not built here" in last(final, "LABEL")
