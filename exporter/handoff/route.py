"""One way to serve an engine: the commands, or why there are none."""

import shlex
from dataclasses import dataclass
from typing import Any

ENGINE_DIR = "ENGINE_DIR"


@dataclass(frozen=True)
class Route:
    """`commands` are argument lists in which ENGINE_DIR stands for the engine's directory; without any, `why` tells
    why this consumer does not take the engine. `checked`: where the flags were read. `python`: a program instead."""

    name: str
    title: str
    commands: tuple[tuple[str, ...], ...] = ()
    why: str = ""
    notes: tuple[str, ...] = ()
    checked: str = ""
    python: str = ""

    @property
    def open(self) -> bool:
        """Whether this consumer takes the engine."""
        return bool(self.commands or self.python)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "takes_it": self.open,
            "commands": [list(command) for command in self.commands],
            "python": self.python,
            "why": self.why,
            "notes": list(self.notes),
            "checked": self.checked,
        }


def shell(command: tuple[str, ...]) -> str:
    """A command as one types it, an option to a line where it is long."""
    words = [shlex.quote(word) for word in command]
    line = " ".join(words)
    if len(line) <= 100:
        return line
    lines = [words[0]]
    for word in words[1:]:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n    ".join(lines)
