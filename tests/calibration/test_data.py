"""Calibration data against the `tokenizers` library used directly, and every file that is refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from calibration.data import CalibrationData, load
from calibration.data_file import PASSAGE_BYTES, scan
from exporter.core.config import ModelConfig
from exporter.core.errors import InputError
from tests.support.tiny import tokenizer

LINES = [f"def number_{i}(x):\n    return x + {i}  # Grüße\n" for i in range(600)]
Checkpoint = Callable[..., Path]


@pytest.fixture
def model(tiny_checkpoint: Checkpoint) -> Path:
    return tiny_checkpoint("gqa")


def load_from(model: Path, path: Path, **options: object) -> CalibrationData:
    given = {"tokens": 8 * 32, "length": 32, **options}
    return load(path, model, ModelConfig.from_directory(model), **given)  # type: ignore[arg-type]


def test_plain_text_is_cut_into_passages_that_together_are_the_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    found = scan(path)
    passages = [found.read(index) for index in range(len(found))]
    assert "".join(map(str, passages)) == "".join(LINES)
    assert len(passages) > 2
    assert all(PASSAGE_BYTES <= len(str(each).encode()) <= 2 * PASSAGE_BYTES for each in passages[:-1])
    assert all(str(each).endswith("\n") for each in passages)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_text_without_line_ends_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" + "ü漢🙂" * 4000, encoding="utf-8")
    found = scan(path)
    assert "".join(str(found.read(index)) for index in range(len(found))) == path.read_text(encoding="utf-8")


def test_sequences_are_the_documents_packed_in_the_order_of_the_seed(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES), encoding="utf-8")
    data = load_from(model, path, seed=3)
    library = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    order = np.random.default_rng(3).permutation(len(LINES))
    ids = [token for index in order for token in library.encode(LINES[index]).ids]
    np.testing.assert_array_equal(data.ids, np.array(ids[: 8 * 32]).reshape(8, 32))
    assert data.summary.to_json() == {
        "text_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "format": "jsonl",
        "documents": data.summary.documents,
        "tokens": 256,
        "sequences": 8,
        "length": 32,
        "seed": 3,
    }
    assert len(library.encode("".join(LINES[i] for i in order[: data.summary.documents])).ids) >= 256


def test_one_seed_gives_one_sample_and_another_seed_another(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES), encoding="utf-8")
    digests = [load_from(model, path, seed=seed).digest for seed in (1, 1, 2, 3)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert load_from(model, path).ids.dtype == np.int64


def test_the_tokenizers_own_special_tokens_begin_a_document(model: Path, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    data = load(path, tmp_path, ModelConfig.from_directory(model), tokens=256, length=32)
    assert data.ids[0, 0] == 0
    assert (data.ids == 0).sum() == data.summary.documents


def test_chats_go_through_the_template_and_get_no_more_special_tokens(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    chats = [[{"role": "user", "content": line}] for line in LINES]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    template = tokenizer()
    data = load_from(model, path, render=lambda messages: template.apply_chat_template(messages, tokenize=False))
    order = np.random.default_rng(0).permutation(len(chats))
    texts = [template.apply_chat_template(chats[index], tokenize=False) for index in order]
    ids = [token for text in texts for token in template(text, add_special_tokens=False)["input_ids"]]
    np.testing.assert_array_equal(data.ids.reshape(-1), ids[:256])
    assert data.summary.format == "chat"


def test_sequences_are_no_longer_than_the_models_positions(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    assert load_from(model, path, tokens=512, length=512).ids.shape == (4, 128)


def test_a_short_text_gives_the_sequences_it_has(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES[:4]), encoding="utf-8")
    data = load_from(model, path, tokens=10_000)
    assert 1 <= data.summary.sequences < 10_000 // 32
    assert data.summary.tokens == data.ids.size


GOOD = b'{"text": "words"}\n'
REFUSED = {
    "empty": (b"", "data.empty", "no text"),
    "blank": (b"  \n \n", "data.empty", "no text"),
    "NUL": (b"words " * 1000 + b"\0 more", "data.binary", "offset 6000"),
    "control characters": (b"words \x01\x02\x03" * 300, "data.binary", "offset 6"),
    "UTF-16": ("words".encode("utf-16"), "data.encoding", "UTF-16"),
    "short": (b"word", "data.too_short", "too few for one sequence of 32"),
    "broken line": (GOOD * 4 + b'{"text": \n', "data.line", "line 5"),
    "a line of another kind": (GOOD * 2 + b'{"messages": []}\n', "data.mixed", "line 3"),
    "without the keys": (GOOD + b'{"txt": "words"}\n', "data.keys", "line 2"),
    "text that is none": (GOOD + b'{"text": 3}\n', "data.keys", "line 2"),
    "half a surrogate pair": (GOOD + b'{"text": "a \\ud83d b"}\n', "data.line", "line 2 has half of a surrogate pair"),
    "half a pair in a chat": (b'{"messages": [{"role": "user", "content": "\\udc00"}]}\n', "data.line", "udc00"),
    "an array": (GOOD + b"[1]\n", "data.line", "line 2"),
    "a chat": (b'{"messages": [{"role": "user", "content": "words"}]}\n', "data.chat_template", "no chat template"),
}
REFUSED["latin-1"] = (("x" * 9000 + "é").encode("latin-1"), "data.encoding", "offset 9000")


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, model: Path, tmp_path: Path) -> None:
    content, kind, words = REFUSED[case]
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        load_from(model, path)
    assert refusal.value.kind == kind and refusal.value.exit_code == 2
    assert words in refusal.value.message


def test_a_file_called_jsonl_must_be_that(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(b"plain words\n" * 100)
    with pytest.raises(InputError, match="line 1 is not JSON"):
        load_from(model, path)


def test_source_code_that_begins_with_a_brace_is_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"{\n  int x;\n}\n" * 100)
    assert scan(path).format == "text"


def test_a_byte_order_mark_of_utf8_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfwords\n")
    found = scan(path)
    assert found.read(0) == "words\n"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_missing_file_missing_tokenizer_and_foreign_tokenizer(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    with pytest.raises(InputError) as refusal:
        load_from(model, path)
    assert refusal.value.kind == "data.unreadable"
    path.write_text("".join(LINES), encoding="utf-8")
    config = ModelConfig.from_directory(model)
    with pytest.raises(InputError) as refusal:
        load(path, tmp_path, config, tokens=64, length=32)
    assert refusal.value.kind == "tokenizer.missing"
    small = ModelConfig(**{**config.__dict__, "vocab_size": 100})
    with pytest.raises(InputError) as refusal:
        load(path, model, small, tokens=64, length=32)
    assert refusal.value.kind == "data.vocabulary"


def test_fewer_tokens_than_one_sequence(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        load_from(model, tmp_path / "x", tokens=31)
    assert refusal.value.kind == "data.tokens"
