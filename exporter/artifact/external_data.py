"""Where an ONNX file says its weights lie, found by walking the protobuf wire format; nothing is decoded or run.

Format: https://protobuf.dev/programming-guides/encoding and onnx.proto (field numbers below).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from exporter.core.errors import ArtifactError

MAX_FIELDS = 20_000_000
MAX_DEPTH = 64

# message -> {field number: message}; every way from a model to a tensor.
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class ExternalData:
    """One tensor's external_data entries: keys are `location`, `offset`, `length`, `checksum`."""

    entries: tuple[tuple[str, str], ...]

    def values(self, key: str) -> list[str]:
        return [value for name, value in self.entries if name == key]


def external_data(model: bytes) -> Iterator[ExternalData]:
    """Every tensor with external data, also inside attributes, subgraphs and functions.

    Raises ArtifactError (`artifact.external_data`) when the bytes are no protobuf or nest absurdly.
    """
    data = memoryview(model)
    budget = MAX_FIELDS
    stack = [("model", 0, len(data), 0)]
    while stack:
        message, position, end, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise malformed(f"it is nested deeper than {MAX_DEPTH}")
        entries = []
        for field, start, stop in _fields(data, position, end):
            budget -= 1
            if budget < 0:
                raise malformed(f"it has more than {MAX_FIELDS} fields")
            child = MESSAGES[message].get(field)
            if child == "entry":
                entries.append(_entry(data, start, stop))
            elif child is not None:
                stack.append((child, start, stop, depth + 1))
        if entries:
            yield ExternalData(tuple(entries))


def malformed(why: str) -> ArtifactError:
    return ArtifactError("artifact.external_data", f"an ONNX file is malformed: {why}", "do not use this engine")


def _entry(data: memoryview, start: int, stop: int) -> tuple[str, str]:
    """One StringStringEntryProto; of a repeated field the last one counts, as in every protobuf reader."""
    parts = {1: "", 2: ""}
    for field, first, last in _fields(data, start, stop):
        if field in parts:
            try:
                parts[field] = bytes(data[first:last]).decode("utf-8")
            except UnicodeDecodeError as error:
                raise malformed("an external_data entry is not text") from error
    return parts[1], parts[2]


def _fields(data: memoryview, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, first byte, end) of each length-delimited field; other fields are skipped with number 0."""
    while position < end:
        tag, position = _varint(data, position, end)
        field, wire = tag >> 3, tag & 7
        if field == 0:
            raise malformed("it has a field number 0")
        start = position
        if wire == VARINT:
            _, position = _varint(data, position, end)
        elif wire == FIXED64:
            position += 8
        elif wire == FIXED32:
            position += 4
        elif wire == BYTES:
            length, start = _varint(data, position, end)
            position = start + length
        else:
            raise malformed(f"it has the wire type {wire}")
        if position > end:
            raise malformed("a field is longer than what holds it")
        yield (field if wire == BYTES else 0), start, position


def _varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= end or shift > 63:
            raise malformed("a number is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
