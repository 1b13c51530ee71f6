"""One safetensors file: what the reader accepts must be what the reference library reads; the rest is refused."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from exporter.core.errors import EngineSmithError, InputError, UnsupportedError
from exporter.core.safetensors_file import read_header, read_rows
from tests.core.raw_safetensors import entry, file_bytes

GOOD = {"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}
DATA = bytes(range(32))


def refused(path: Path, content: bytes) -> EngineSmithError:
    path.write_bytes(content)
    with pytest.raises(EngineSmithError) as caught:
        read_header(path)
    assert path.name in caught.value.message
    assert caught.value.remedy
    return caught.value


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": rng.standard_normal((5, 7)).astype(np.float32),
        "half": rng.standard_normal((3, 2)).astype(np.float16),
        "vector": np.arange(4, dtype=np.float32),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    found = read_header(path)
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        whole = read_rows(found[name], 0, expected.shape[0])
        assert whole.dtype == expected.dtype
        np.testing.assert_array_equal(whole, expected)
        np.testing.assert_array_equal(read_rows(found[name], 1, 3), expected[1:3])
        assert read_rows(found[name], 2, 2).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 3), (2, 1)])
def test_rows_outside_the_tensor_are_a_programming_error(tmp_path: Path, start: int, stop: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(GOOD, DATA))
    with pytest.raises(ValueError, match="rows"):
        read_rows(read_header(path)["a"], start, stop)


def test_a_file_cut_after_opening_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(GOOD, DATA))
    info = read_header(path)["b"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError) as caught:
        read_rows(info, 0, 4)
    assert caught.value.kind == "checkpoint.truncated"


def test_a_file_gone_after_opening_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(GOOD, DATA))
    info = read_header(path)["a"]
    path.unlink()
    for action in (lambda: read_rows(info, 0, 2), lambda: read_header(path)):
        with pytest.raises(InputError) as caught:
            action()
        assert caught.value.kind == "checkpoint.unreadable"


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 40, -33, -32, -1])
def test_truncated_anywhere(tmp_path: Path, keep: int) -> None:
    assert refused(tmp_path / "x.safetensors", file_bytes(GOOD, DATA)[:keep]).kind == "checkpoint.truncated"


@pytest.mark.parametrize(
    ("length", "kind"),
    [
        (0, "header"),
        (1, "header"),
        (len(json.dumps(GOOD)) - 1, "header"),
        (len(json.dumps(GOOD)) + 1, "header"),
        (len(json.dumps(GOOD)) + 33, "truncated"),
        (100_000_001, "header"),
        (1 << 62, "header"),
        (1 << 63, "header"),
        ((1 << 64) - 1, "header"),
    ],
)
def test_header_length_that_lies(tmp_path: Path, length: int, kind: str) -> None:
    assert refused(tmp_path / "x.safetensors", file_bytes(GOOD, DATA, length)).kind == f"checkpoint.{kind}"


BAD_HEADERS = {
    "not JSON": b"{nonsense}",
    "list": b"[]",
    "number": b"7",
    "white space first": b" " + json.dumps(GOOD).encode(),
    "not UTF-8": b'{"\xff\xfe": 1}',
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "nested too deeply": b'{"a":' + b"[" * 100_000,
    "key twice": b'{"a": %s, "a": %s}' % ((json.dumps(GOOD["a"]).encode(),) * 2),
    "key twice inside": b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}',
    "NaN": b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 32]}}',
    "integer of many digits": b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 32]}}' % (b"9" * 5000),
    "entry is a list": json.dumps({"a": []}).encode(),
    "entry is null": json.dumps({"a": None}).encode(),
    "entry is empty": json.dumps({"a": {}}).encode(),
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_header_that_is_not_one(tmp_path: Path, header: bytes) -> None:
    assert refused(tmp_path / "x.safetensors", file_bytes(header, DATA)).kind == "checkpoint.header"


BAD_ENTRIES = {
    "overlap": {"a": entry("F32", [4], 0, 16), "b": entry("F32", [5], 12, 32)},
    "same bytes twice": {"a": entry("F32", [8], 0, 32), "b": entry("F32", [8], 0, 32)},
    "gap": {"a": entry("F32", [3], 0, 12), "b": entry("F32", [4], 16, 32)},
    "gap at the start": {"a": entry("F32", [7], 4, 32)},
    "size does not fit the shape": {"a": entry("F32", [7], 0, 32)},
    "offsets reversed": {"a": entry("F32", [8], 32, 0)},
    "negative offset": {"a": entry("F32", [8], -32, 0)},
    "negative dims": {"a": entry("F32", [-2, -4], 0, 32)},
    "huge dims": {"a": entry("F32", [1 << 62, 1 << 62], 0, 32)},
    "dims that wrap around": {"a": entry("F32", [1 << 32, 1 << 32, 8], 0, 32)},
    "dims beyond 64 bits": {"a": entry("F32", [1 << 64], 0, 1 << 66)},
    "bool dim": {"a": entry("F32", [True, 8], 0, 32)},
    "float dim": {"a": entry("F32", [8.0], 0, 32)},
    "text dim": {"a": entry("F32", ["8"], 0, 32)},
    "many dims": {"a": entry("F32", [1] * 50 + [8], 0, 32)},
    "shape is a number": {"a": {**entry("F32", [], 0, 32), "shape": 8}},
    "bool offset": {"a": entry("F32", [8], False, 32)},
    "three offsets": {"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 16, 32]}},
    "dtype is a list": {"a": {**GOOD["a"], "dtype": ["F32"]}},
    "dtype is null": {"a": {**GOOD["a"], "dtype": None}},
}


@pytest.mark.parametrize("header", BAD_ENTRIES.values(), ids=BAD_ENTRIES.keys())
def test_entry_that_is_wrong(tmp_path: Path, header: object) -> None:
    assert refused(tmp_path / "x.safetensors", file_bytes(header, DATA)).kind == "checkpoint.header"


def test_tensor_beyond_the_end_is_truncated(tmp_path: Path) -> None:
    content = file_bytes({"a": entry("F32", [9], 0, 36)}, DATA)
    assert refused(tmp_path / "x.safetensors", content).kind == "checkpoint.truncated"


@pytest.mark.parametrize("header", [GOOD, {}], ids=["tensors", "empty"])
def test_bytes_that_no_tensor_owns(tmp_path: Path, header: dict[str, object]) -> None:
    assert refused(tmp_path / "x.safetensors", file_bytes(header, DATA + b"\0")).kind == "checkpoint.trailing"


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "F64", "bf16", "", "X" * 10_000])
def test_dtype_that_is_not_a_weight(tmp_path: Path, dtype: str) -> None:
    error = refused(tmp_path / "x.safetensors", file_bytes({"a": entry(dtype, [8], 0, 32)}, DATA))
    assert isinstance(error, UnsupportedError)
    assert len(error.message) < 300


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_refused_or_read_like_the_library(tmp_path: Path, seed: int) -> None:
    """Random damage never raises anything else, and nothing is accepted that the reference library refuses."""
    rng = random.Random(seed)
    path = tmp_path / "x.safetensors"
    sound = file_bytes({"__metadata__": {"format": "pt"}, **GOOD}, DATA)
    for _ in range(150):
        content = damage(sound, rng)
        path.write_bytes(content)
        try:
            found = read_header(path)
        except EngineSmithError:
            continue
        with safetensors.safe_open(path, "numpy") as reference:
            assert set(reference.keys()) == found.keys()
            for name, info in found.items():
                piece = reference.get_slice(name)
                assert tuple(piece.get_shape()) == info.shape, content
                read_rows(info, 0, info.shape[0])


def damage(content: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, remove or insert a few bytes of prefix and header, or cut the file."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) - len(DATA))
        kind = rng.choice(("flip", "digit", "remove", "insert", "cut"))
        if kind == "flip":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "digit":
            changed[at] = rng.choice(b'0123456789-{}[]",:eE.')
        elif kind == "remove":
            del changed[at : at + rng.randint(1, 8)]
        elif kind == "insert":
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        else:
            del changed[rng.randrange(len(DATA) + 1, len(changed)) :]
        if len(changed) <= len(DATA) + 1:
            break
    return bytes(changed)
