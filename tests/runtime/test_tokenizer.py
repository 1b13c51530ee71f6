"""Encoding as transformers does it; streaming pieces that join to the whole text."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers
from transformers import AutoTokenizer

from exporter.core.errors import ArtifactError, InputError
from exporter.runtime.tokenizer import MAX_PENDING, Tokenizer

TEXTS = ["Hello, world", "def f(x):\n    return x  # ünïcode", "你好，世界 🙂🙃", "", " ", "a\ufffdb", "e\u0301 👩‍👩‍👧"]


@pytest.fixture(scope="module")
def directory(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("gqa")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def llama2() -> Tokenizer:
    """Llama 2's kind: spaces as U+2581, single bytes as a fallback, the leading space dropped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "▁hi", "é"]
    inner = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    return Tokenizer(inner)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_is_that_of_transformers(directory: Path, tokenizer: Tokenizer, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.encode(text)
    assert ids == theirs(text).input_ids
    assert tokenizer.decode(ids) == text == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == text


def test_incomplete_characters_are_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂")
    assert len(ids) == 4
    assert streamed(tokenizer, ids) == ["", "", "", "🙂", ""]
    assert streamed(tokenizer, ids[:2]) == ["", "", "\ufffd"]


def test_random_tokens_stream_to_what_they_decode_to(tokenizer: Tokenizer) -> None:
    dice = random.Random(0)
    for _ in range(200):
        text = "".join(
            chr(dice.choice([dice.randrange(32, 127), dice.randrange(0x3B1, 0x3C9), 0x1F642])) for _ in range(30)
        )
        ids = tokenizer.encode(text)
        for position in sorted(dice.sample(range(len(ids)), 3)):
            ids.insert(position, dice.choice([0, 1, 100_000, -1]))  # special tokens, ids without a token
        assert "".join(streamed(tokenizer, ids)).replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


def test_bytes_that_never_become_a_character_do_not_pile_up(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("🙂")[1]
    pieces = streamed(tokenizer, [broken] * 200)
    assert sum(map(len, pieces)) == 200
    assert len([piece for piece in pieces if piece]) >= 200 // MAX_PENDING


def test_ids_without_a_token_are_silent(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok")
    assert tokenizer.decode([*ids, 319_000, -5, 1 << 40]) == "ok"
    assert "".join(streamed(tokenizer, [0, *ids, 1, 1 << 40])) == "ok"


def test_sentencepiece_style_spaces_and_bytes(llama2: Tokenizer) -> None:
    for text in ("hi a a", "a  a", "é🙂 a", " hi"):
        ids = llama2.encode(text)
        assert "".join(streamed(llama2, ids)) == llama2.decode(ids)
    ids = [1, 262, 262, 260, 2]
    assert streamed(llama2, ids) == ["", "hi", " hi", " a", "", ""]
    assert llama2.decode(ids) == "hi hi a"
    assert streamed(llama2, [259, 262]) == ["", " hi", ""]
    assert streamed(llama2, [3 + byte for byte in "é".encode()]) == ["", "é", ""]


def test_truncation_and_padding_of_the_file_are_ignored(directory: Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    inner.enable_truncation(2)
    inner.enable_padding(length=50)
    made = Tokenizer(inner)
    assert made.decode(made.encode("a longer text")) == "a longer text"


def test_text_that_is_not_unicode(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError) as caught:
        tokenizer.encode("a\ud800")
    assert caught.value.kind == "run.prompt"


def test_an_unreadable_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError) as caught:
        Tokenizer.from_directory(tmp_path)
    assert caught.value.kind == "artifact.tokenizer"
