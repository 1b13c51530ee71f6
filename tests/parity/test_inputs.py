"""Token rows: from real text, within the limits of the engine, each row from another place."""

from pathlib import Path

import numpy as np
import pytest

from exporter.core.config import ModelConfig
from exporter.core.errors import InputError
from exporter.parity.inputs import ParityPlan, inputs_from_tokens, parity_inputs, read_text, sample_text, tokenize
from tests.conftest import CheckpointFactory

TOKENS = np.arange(1000, 3000)


@pytest.mark.parametrize("limit", [8, 9, 31, 64, 128, 700, 4096])
def test_rows_fit_the_engine(limit: int) -> None:
    inputs = inputs_from_tokens(TOKENS, [1], 5000, limit, ParityPlan())
    assert len(inputs.long_row) == limit
    assert inputs.main_length <= limit
    assert inputs.prefill >= 1
    assert all(len(row) <= limit for row in inputs.rows)
    assert len(set(map(len, inputs.ragged))) == len(inputs.ragged) or limit < 16
    assert inputs.tail_positions[-1] == limit - 1
    assert all((row >= 0).all() and (row < 5000).all() for row in inputs.rows)
    assert all(row[0] == 1 for row in inputs.rows)
    for index, prompt in enumerate(inputs.ragged_prompts):
        assert len(inputs.ragged[index]) == prompt + inputs.ragged_steps


def test_contract_amounts() -> None:
    inputs = inputs_from_tokens(TOKENS, [], 5000, 4096, ParityPlan())
    assert inputs.prefill == 256
    assert inputs.decode >= 32
    assert min(inputs.plan.single_steps, inputs.decode) >= 32
    starts = [row[0] for row in inputs.rows]
    assert len(set(starts)) == len(starts)


def test_ids_wrap_at_the_vocabulary() -> None:
    inputs = inputs_from_tokens(TOKENS, [1], 100, 64, ParityPlan())
    assert max(row.max() for row in inputs.rows) < 100


def test_too_short() -> None:
    with pytest.raises(InputError) as caught:
        inputs_from_tokens(TOKENS, [], 100, 7, ParityPlan())
    assert caught.value.kind == "parity.too_short"


def test_from_a_checkpoint(tiny_checkpoint: CheckpointFactory) -> None:
    path = tiny_checkpoint("gqa")
    inputs = parity_inputs(path, ModelConfig.from_directory(path), 128, "Some words, again and again. ")
    assert len(inputs.long_row) == 128
    assert len(np.unique(inputs.long_row)) > 5
    assert (inputs.long_row[:50] != parity_inputs(path, ModelConfig.from_directory(path), 128).long_row[:50]).any()


def test_tokenizer_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        tokenize(tmp_path, "text")
    assert caught.value.kind == "tokenizer.missing"


def test_broken_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError) as caught:
        tokenize(tmp_path, "text")
    assert caught.value.kind == "tokenizer.invalid"


def test_prefix_is_what_the_tokenizer_adds(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(tiny_checkpoint("gqa") / "tokenizer.json"))
    plain = tokenizer.encode("alpha beta", add_special_tokens=False).ids
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids, prefix = tokenize(tmp_path, "alpha beta")
    assert ids.tolist() == plain
    assert prefix == [0]


@pytest.mark.parametrize("content", [b"", b"  \n", b"\xff\xfe\xff"])
def test_bad_text(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_text(tmp_path / "text")
    assert caught.value.kind == "parity.text"


def test_missing_text(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_text(tmp_path / "none")


def test_sample_is_varied() -> None:
    text = sample_text()
    assert 7000 < len(text.encode()) < 12000
    assert "def " in text
    assert "struct" in text
    assert any(ord(c) > 0x3000 for c in text)
