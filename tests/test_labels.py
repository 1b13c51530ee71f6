"""Which token stands for a label: the first that the tokenizer makes of it; what cannot be told apart is refused."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from exporter.core.config import ModelConfig
from exporter.core.errors import InputError
from exporter.labels import label_task, named_labels
from tests.conftest import CheckpointFactory

EXAMPLE = Path(__file__).parents[1] / "examples" / "stdlib-llama"


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_directory(EXAMPLE)


@pytest.mark.parametrize("labels", [("def", "class"), (" safe", " unsafe"), ("\nyes", "#5"), ("é", "日本")])
def test_first_tokens_are_those_of_transformers(config: ModelConfig, labels: tuple[str, ...]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    expected = [
        int(label[1:]) if label.startswith("#") else tokenizer(label, add_special_tokens=False).input_ids[0]
        for label in labels
    ]
    task = label_task(EXAMPLE, labels, config)
    assert (task.kind, task.labels, list(task.token_ids)) == ("classify", labels, expected)


def test_labels_of_several_tokens_say_so(config: ModelConfig) -> None:
    found = named_labels(EXAMPLE, label_task(EXAMPLE, ("class", "unsafe thing"), config), config)
    assert (found[0].tokens, found[0].token) == (1, "class")
    assert found[1].tokens > 1 and found[1].token == "un"
    assert found[1].describe() == f"label 'unsafe thing': token {found[1].token_id} ('un', the first of its 4)"


REFUSED = {
    "labels.count": [(), ("alone",)],
    "labels.empty": [("a", ""), (" ", "a")],
    "labels.repeated": [("a", "b", "a")],
    "labels.spaces": [("safe", " unsafe")],
    "labels.shared": [("unsafe", "unsafe thing"), ("#320", "def")],
    "labels.token_id": [("#4096", "a"), ("a", "#99999999999999")],
    "labels.text": [("a", "\ud800")],
}


@pytest.mark.parametrize(("kind", "labels"), [(kind, each) for kind, every in REFUSED.items() for each in every])
def test_bad_labels_are_refused(config: ModelConfig, kind: str, labels: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        label_task(EXAMPLE, labels, config)
    assert caught.value.kind == kind and caught.value.remedy


def test_labels_that_share_a_token_are_named_with_it(config: ModelConfig) -> None:
    with pytest.raises(InputError, match=r"'def', '#320' with token 320") as caught:
        label_task(EXAMPLE, ("def", "class", "#320"), config)
    assert "#1234" in caught.value.remedy


def test_a_checkpoint_without_a_tokenizer(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_checkpoint("gqa"), tmp_path / "bare"))
    (path / "tokenizer.json").unlink()
    with pytest.raises(InputError) as caught:
        label_task(path, ("a", "b"), ModelConfig.from_directory(path))
    assert caught.value.kind == "tokenizer.missing"


def test_a_label_of_unknown_tokens(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """A tokenizer with a token for everything it does not know: that one tells nothing."""
    path = Path(shutil.copytree(tiny_checkpoint("gqa"), tmp_path / "words"))
    vocabulary = {"[UNK]": 0, "yes": 1, "no": 2}
    words = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    (path / "tokenizer.json").write_text(json.dumps(words))
    config = ModelConfig.from_directory(path)
    assert label_task(path, ("yes", "no"), config).token_ids == (1, 2)
    with pytest.raises(InputError, match="'maybe' begins with no token") as caught:
        label_task(path, ("yes", "maybe"), config)
    assert caught.value.kind == "labels.unknown"
