"""Dockerfiles as instructions: https://docs.docker.com/reference/dockerfile/"""

import re
from dataclasses import dataclass
from pathlib import Path

KNOWN = {
    *("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "MAINTAINER"),
    *("ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
}


@dataclass(frozen=True)
class Instruction:
    name: str
    arguments: str


def read_dockerfile(path: Path) -> list[Instruction]:
    """Comments dropped, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    parts = [line.split(None, 1) for line in joined.splitlines()]
    assert all(len(part) == 2 and part[0] in KNOWN for part in parts), parts
    return [Instruction(name, arguments.strip()) for name, arguments in parts]


def stages(instructions: list[Instruction]) -> list[list[Instruction]]:
    found: list[list[Instruction]] = []
    for instruction in instructions:
        if instruction.name == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


def last(stage: list[Instruction], name: str) -> str:
    """The arguments of the one that counts: the last."""
    return [instruction.arguments for instruction in stage if instruction.name == name][-1]
