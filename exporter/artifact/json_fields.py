"""Reading JSON that may be damaged or hostile: bounded, typed field by field, ArtifactError for everything."""

import json
import math
from typing import Any

from exporter.core.errors import ArtifactError

MAX_DEPTH = 32


def damaged(why: str) -> ArtifactError:
    """The error for a manifest that cannot be trusted."""
    return ArtifactError(
        "artifact.manifest", f"manifest.json is damaged: {why}", "copy the engine again, or build it again"
    )


def parse_object(data: bytes) -> dict[str, Any]:
    """One JSON object; refuses duplicate keys, NaN, infinities and deep nesting."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise damaged(str(error)[:200]) from error
    if not isinstance(value, dict):
        raise damaged(f"it holds a {type(value).__name__}, not an object")
    _check_tree(value)
    return value


def canonical_json(value: dict[str, Any]) -> bytes:
    """The one spelling of an object: sorted keys, two spaces, UTF-8, newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _check_tree(root: object) -> None:
    """Depth, finite numbers and encodable strings, without recursion."""
    level, depth = [root], 0
    while level:
        if depth > MAX_DEPTH:
            raise damaged(f"it is nested deeper than {MAX_DEPTH}")
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
            else:
                _check_leaf(value)
        level, depth = below, depth + 1


def _check_leaf(value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise damaged("it holds a number beyond every limit")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise damaged("it holds a whole number beyond 64 bits")
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise damaged("it holds text that is not Unicode")


class Fields:
    """Typed access to one JSON object; `where` names it in complaints. `done` refuses fields nobody asked for."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise damaged(f"{where} is not an object")
        self._value, self._where = value, where
        self._seen: set[str] = set()

    def _take(self, name: str) -> Any:
        if name not in self._value:
            raise damaged(f"{self._where} lacks {name!r}")
        self._seen.add(name)
        return self._value[name]

    def _wrong(self, name: str, wanted: str) -> ArtifactError:
        return damaged(f"{name!r} in {self._where} is not {wanted}")

    def done(self) -> None:
        if extra := sorted(self._value.keys() - self._seen):
            raise damaged(f"{self._where} has the unknown field {extra[0]!r}")

    def object(self, name: str) -> "Fields":
        return Fields(self._take(name), name)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object whose inside is nobody's business here."""
        value = self._take(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return value

    def optional_mapping(self, name: str) -> dict[str, Any] | None:
        return None if self._take(name) is None else self.mapping(name)

    def text(self, name: str) -> str:
        value = self._take(name)
        if not isinstance(value, str):
            raise self._wrong(name, "text")
        return value

    def digest(self, name: str) -> str:
        value = self.text(name)
        if not is_digest(value):
            raise self._wrong(name, "a SHA-256 in hexadecimal")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        value = self._take(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str) -> float:
        value = self._take(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        return value

    def boolean(self, name: str) -> bool:
        value = self._take(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        return None if self._take(name) is None else self.integer(name, low, high)

    def items(self, name: str) -> list[Any]:
        value = self._take(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value

    def texts(self, name: str) -> list[str]:
        value = self.items(name)
        if not all(isinstance(item, str) for item in value):
            raise self._wrong(name, "a list of texts")
        return value

    def text_mapping(self, name: str) -> dict[str, str]:
        value = self.mapping(name)
        if not all(isinstance(item, str) for item in value.values()):
            raise self._wrong(name, "an object of texts")
        return value


def is_digest(text: str) -> bool:
    """Whether `text` is a SHA-256 in lower-case hexadecimal."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
