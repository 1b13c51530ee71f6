"""Which tokenizers are taken, what of them goes into an artifact, and that its readers can use it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from exporter.artifact.tokenizer_files import read_tokenizer
from exporter.core.config import ModelConfig
from exporter.core.errors import InputError


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("gqa"), tmp_path / "checkpoint"))


def config(checkpoint: Path) -> ModelConfig:
    return ModelConfig.from_directory(checkpoint)


def kind_of(checkpoint: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_tokenizer(checkpoint, config(checkpoint))
    assert caught.value.message and caught.value.remedy
    return caught.value.kind


def edit(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps({key: v for key, v in {**value, **changes}.items() if v is not None}))


def test_files_are_kept_and_transformers_reads_them_alike(checkpoint: Path, tmp_path: Path) -> None:
    files = read_tokenizer(checkpoint, config(checkpoint))
    out = tmp_path / "out"
    out.mkdir()
    files.write(out)
    assert files.size == 320
    names = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    before, after = (AutoTokenizer.from_pretrained(path) for path in (checkpoint, out))
    assert before("Hello, wörld 你").input_ids == after("Hello, wörld 你").input_ids
    assert before.chat_template == after.chat_template


def test_a_template_in_tokenizer_config_becomes_a_file(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    assert "chat_template.jinja" not in read_tokenizer(checkpoint, config(checkpoint)).files
    edit(checkpoint / "tokenizer_config.json", chat_template="{{ 1 }}")
    assert read_tokenizer(checkpoint, config(checkpoint)).files["chat_template.jinja"] == b"{{ 1 }}"
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    edit(checkpoint / "tokenizer_config.json", chat_template=templates)
    assert read_tokenizer(checkpoint, config(checkpoint)).files["chat_template.jinja"] == b"d"
    edit(checkpoint / "tokenizer_config.json", chat_template=5)
    assert kind_of(checkpoint) == "chat.template"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("LlamaTokenizerFast", "LlamaTokenizerFast"),
        ("PreTrainedTokenizerFast", "PreTrainedTokenizerFast"),
        ("TokenizersBackend", "TokenizersBackend"),
        ("SomethingElse", "TokenizersBackend"),
        (None, "TokenizersBackend"),
        (7, "TokenizersBackend"),
    ],
)
def test_the_tokenizer_class_is_one_that_genai_knows(checkpoint: Path, given: object, kept: str) -> None:
    edit(checkpoint / "tokenizer_config.json", tokenizer_class=given)
    written = json.loads(read_tokenizer(checkpoint, config(checkpoint)).files["tokenizer_config.json"])
    assert written["tokenizer_class"] == kept and written["eos_token"] == "</s>"


def test_without_tokenizer_config(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").unlink()
    written = read_tokenizer(checkpoint, config(checkpoint)).files["tokenizer_config.json"]
    assert json.loads(written) == {"tokenizer_class": "TokenizersBackend"}


def test_missing_tokenizers(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    assert kind_of(checkpoint) == "tokenizer.missing"
    (checkpoint / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(InputError, match=r"tokenizer\.model alone") as caught:
        read_tokenizer(checkpoint, config(checkpoint))
    assert "save_pretrained" in caught.value.remedy


def test_a_vocabulary_larger_than_the_model(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", vocab_size=319)
    assert kind_of(checkpoint) == "tokenizer.vocabulary"


def test_a_sparse_vocabulary_counts_by_its_largest_id(checkpoint: Path) -> None:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["far"] = 5000
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="5000"):
        read_tokenizer(checkpoint, config(checkpoint))


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"\xff", b'{"model": {"type": "BPE"}}', b'{"model": ' * 1000, b'{"model": null}']
)
def test_damaged_tokenizers(checkpoint: Path, data: bytes) -> None:
    (checkpoint / "tokenizer.json").write_bytes(data)
    assert kind_of(checkpoint) == "tokenizer.file"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
def test_damaged_side_files(checkpoint: Path, name: str) -> None:
    known = config(checkpoint)
    (checkpoint / name).write_text("[")
    with pytest.raises(InputError) as caught:
        read_tokenizer(checkpoint, known)
    assert caught.value.kind == "tokenizer.file"


def test_a_template_that_is_not_text(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert kind_of(checkpoint) == "chat.template"
