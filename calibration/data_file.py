"""Finding the documents of a file of calibration text: plain text, or JSON lines with `text` or `messages`.

The file is read once in a stream; what stays in memory is where each document lies. Everything that is not such text
is refused with its place in the file.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from exporter.core.errors import InputError
from exporter.core.strict_json import parse_json, shorten

PASSAGE_BYTES = 4096
"""Plain text is cut into passages of at least this many bytes, at the next end of a line."""
BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
UTF8_MARK = b"\xef\xbb\xbf"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Backspace, tab, line feed, vertical tab, form feed, carriage return and escape occur in real text.
CONTROL_BYTES = bytes(sorted({*range(1, 32), 127} - {8, 9, 10, 11, 12, 13, 27}))
# More than this fraction of other control bytes, and it is no text.
MAX_CONTROL = 1e-3


@dataclass(frozen=True)
class TextFile:
    """Where the documents of a file lie. `format` is `text`, `jsonl` or `chat`; sha256 of all its bytes."""

    path: Path
    format: str
    starts: "array[int]"
    lengths: "array[int]"
    sha256: str

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int) -> str | list[dict[str, Any]]:
        """One document: its text, or the messages of a chat."""
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            data = file.read(self.lengths[index])
        if len(data) != self.lengths[index]:
            raise InputError("data.changed", f"{self.path.name} became shorter while it was read", "run it again")
        if self.format == "text":
            return data.decode("utf-8")
        value: str | list[dict[str, Any]] = parse_json(data)["text" if self.format == "jsonl" else "messages"]
        return value


def scan(path: Path) -> TextFile:
    """Find the documents of a file and check all of it. Raises InputError (`data.*`)."""
    try:
        with path.open("rb") as file:
            found = _scan_lines(path, file) if _is_json_lines(path, file) else _scan_text(path, file)
    except OSError as error:
        why = f"cannot read {path}: {error.strerror or error}"
        raise InputError("data.unreadable", why, "give a file of text to --calibration") from error
    if not found.starts:
        raise InputError(
            "data.empty", f"{path.name} holds no text", "give a file with text the model should be good at"
        )
    return found


def _is_json_lines(path: Path, file: BinaryIO) -> bool:
    """By the name, or because the first line is a JSON object."""
    start = file.read(4)
    for mark, name in BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            raise _encoding(path, 0, f"it begins with the byte order mark of {name}")
    file.seek(len(UTF8_MARK) if start.startswith(UTF8_MARK) else 0)
    if path.suffix.lower() in JSON_SUFFIXES:
        return True
    here, line = file.tell(), file.readline(MAX_LINE_BYTES)
    file.seek(here)
    if not line.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _scan_text(path: Path, file: BinaryIO) -> TextFile:
    digest, starts, lengths = hashlib.sha256(), array("q"), array("q")
    position, controls, first_control, size = file.tell(), 0, -1, 0
    digest.update(UTF8_MARK if position else b"")
    for passage in _passages(file, digest):
        _check_bytes(path, passage, position)
        removed = passage.translate(None, CONTROL_BYTES)
        if len(removed) < len(passage) and first_control < 0:
            first_control = position + next(i for i, byte in enumerate(passage) if byte in CONTROL_BYTES)
        controls, size = controls + len(passage) - len(removed), size + len(passage)
        if passage.strip():
            starts.append(position)
            lengths.append(len(passage))
        position += len(passage)
    if controls > MAX_CONTROL * size:
        raise _binary(path, first_control, f"{controls} of its {size} bytes are control characters")
    return TextFile(path, "text", starts, lengths, digest.hexdigest())


def _passages(file: BinaryIO, digest: "hashlib._Hash") -> Iterator[bytes]:
    """The whole file in passages: at least PASSAGE_BYTES, up to the next end of a line, at most twice as long."""
    buffer = b""
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
        buffer, start = buffer + block, 0
        while len(buffer) - start > 2 * PASSAGE_BYTES:
            end = buffer.find(b"\n", start + PASSAGE_BYTES, start + 2 * PASSAGE_BYTES) + 1
            end = end or _character_end(buffer, start + 2 * PASSAGE_BYTES)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _character_end(data: bytes, end: int) -> int:
    """`end`, or up to 3 bytes before it: not within a character."""
    back = next((step for step in range(4) if data[end - step] & 0xC0 != 0x80), 0)
    return end - back


def _check_bytes(path: Path, data: bytes, position: int) -> None:
    """UTF-8 without NUL, or an error with the offset of the byte."""
    if (zero := data.find(b"\0")) >= 0:
        raise _binary(path, position + zero, "a NUL byte")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _encoding(path, position + error.start, f"byte 0x{data[error.start]:02x}") from error


def _scan_lines(path: Path, file: BinaryIO) -> TextFile:
    digest, starts, lengths = hashlib.sha256(), array("q"), array("q")
    position, format_, first = file.tell(), "", 0
    digest.update(UTF8_MARK if position else b"")
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        digest.update(line)
        if line.strip():
            found = _line_format(path, number, line, position)
            if format_ and found != format_:
                why = f"{path.name}: line {first} has {_key(format_)}, line {number} has {_key(found)}"
                raise InputError("data.mixed", why, "put texts and chats into two files, and calibrate with one")
            if not format_:
                format_, first = found, number
            starts.append(position)
            lengths.append(len(line))
        position += len(line)
    return TextFile(path, format_ or "jsonl", starts, lengths, digest.hexdigest())


def _line_format(path: Path, number: int, line: bytes, position: int) -> str:
    _check_bytes(path, line, position)
    where = f"{path.name}, line {number}"
    if len(line) == MAX_LINE_BYTES:
        raise InputError("data.line", f"{where} is longer than {MAX_LINE_BYTES} bytes", "is it JSON lines?")
    try:
        value = parse_json(line)
    except ValueError as error:
        raise InputError("data.line", f"{where} is not JSON: {error}", "write one JSON object a line") from error
    if not isinstance(value, dict):
        raise InputError("data.line", f"{where} is not a JSON object: {shorten(value)}", 'write {"text": "..."}')
    if b"\\u" in line and (half := LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False))):
        why = f"{where} has half of a surrogate pair, \\u{ord(half[0]):04x}, which is no character"
        raise InputError("data.line", why, "write the file again, with characters whole")
    if isinstance(value.get("text"), str) and "messages" not in value:
        return "jsonl"
    messages = value.get("messages")
    if isinstance(messages, list) and "text" not in value and all(isinstance(each, dict) for each in messages):
        return "chat"
    what = f"{where} has neither `text` (a string) nor `messages` (a list), or both; its keys: {shorten(sorted(value))}"
    raise InputError("data.keys", what, 'write {"text": "..."} or {"messages": [{"role": ..., "content": ...}]}')


def _key(format_: str) -> str:
    return "`text`" if format_ == "jsonl" else "`messages`"


def _binary(path: Path, offset: int, what: str) -> InputError:
    return InputError("data.binary", f"{path.name} is not text: {what}, from offset {offset}", "give a file of text")


def _encoding(path: Path, offset: int, what: str) -> InputError:
    why = f"{path.name} is not UTF-8: {what} at offset {offset}"
    return InputError("data.encoding", why, "convert it: iconv -f ENCODING -t UTF-8")
