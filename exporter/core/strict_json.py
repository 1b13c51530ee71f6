"""JSON from files we did not write: UTF-8, no key twice, no NaN, whatever the nesting or the size of a number."""

import json
from collections import Counter
from typing import Any


def parse_json(data: bytes) -> Any:
    """The value of a JSON document (RFC 8259). Every defect is a ValueError that says what is wrong.

    Python's own reader takes the last of two equal keys and accepts NaN; two readers could then
    disagree about one file, so both are refused here.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {shorten(counts.most_common(1)[0][0])} stands in it twice")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def shorten(value: object, limit: int = 80) -> str:
    """`repr` of a value from a hostile file, cut to a length that a message can carry."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
