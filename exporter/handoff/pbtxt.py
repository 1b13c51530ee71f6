"""Protobuf's text format, as far as a Triton config.pbtxt needs it: https://protobuf.dev/reference/protobuf/textformat-spec/"""

import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Value: TypeAlias = "str | bool | int | Word | Mapping[str, Value] | Sequence[int] | Sequence[Mapping[str, Value]]"


class Word(str):
    """An enumeration's name, written without quotes."""


def write_message(fields: Mapping[str, Value], indent: str = "") -> str:
    """Fields in the order given; a list of messages becomes that many fields of one name."""
    return "".join(_field(name, value, indent) for name, value in fields.items())


def _field(name: str, value: Value, indent: str) -> str:
    if isinstance(value, Mapping):
        return f"{indent}{name} {{\n{write_message(value, indent + '  ')}{indent}}}\n"
    if isinstance(value, str | bool | int):
        return f"{indent}{name}: {_scalar(value)}\n"
    if any(isinstance(item, Mapping) for item in value):
        return "".join(_field(name, item, indent) for item in value)
    numbers = ", ".join(str(item) for item in value)
    return f"{indent}{name}: [ {numbers} ]\n" if numbers else f"{indent}{name}: [ ]\n"


def _scalar(value: str | bool | int) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value)
