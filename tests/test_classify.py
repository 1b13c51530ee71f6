"""Classifiers from the checkpoint to the label, as users make them: on the example model, and with a calibration."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import enginesmith
from exporter.core.checkpoint import Checkpoint
from tests.cli.command import enginesmith as command

Factory = Callable[..., Path]
EXAMPLE = Path(__file__).parents[1] / "examples" / "stdlib-llama"
LABELS = ("def", "class")
TEXTS = [
    "import os\nimport sys\n\n\n",
    '    """A table of names."""\n\n    ',
    "@dataclass\n",
    "@property\n    ",
    "    return self.name\n\n    ",
]


@pytest.fixture(scope="module", params=["onnxruntime", "tvm"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> enginesmith.BuildOutcome:
    pytest.importorskip({"tvm": "tvm"}.get(request.param, "onnxruntime"))
    out = tmp_path_factory.mktemp("classifier") / request.param
    return enginesmith.build(
        EXAMPLE,
        target=request.param,
        recipe="int8-weight",
        out=out,
        max_seq_len=128,
        max_batch=2,
        task="classify",
        labels=LABELS,
    )


def eager_logits(texts: list[str]) -> np.ndarray:
    """float32 [N, 2] of transformers' own model, float32."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    model = LlamaForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32, attn_implementation="eager")
    ids = [tokenizer(label, add_special_tokens=False).input_ids[0] for label in LABELS]
    with torch.no_grad():
        rows = [model(torch.tensor([tokenizer(text).input_ids])).logits[0, -1, ids] for text in texts]
    return torch.stack(rows).numpy()


def test_labels_are_eagers_within_the_recipe(engine: enginesmith.BuildOutcome) -> None:
    assert engine.report is not None and engine.report.passed
    expected = eager_logits(TEXTS)
    with enginesmith.load(engine.path, batch=2) as loaded:
        found = loaded.classify(TEXTS)
    exact, ours = (torch.log_softmax(torch.from_numpy(np.asarray(x)).double(), -1) for x in (
        expected, [list(each.logits.values()) for each in found]
    ))  # fmt: skip
    # The recipe's limit on the mean KL from eager.
    assert float((exact.exp() * (exact - ours)).sum(-1).mean()) <= 0.003
    assert [each.label for each in found] == [LABELS[index] for index in expected.argmax(-1)]
    assert len({each.label for each in found}) == 2


def test_what_the_artifact_says(engine: enginesmith.BuildOutcome) -> None:
    assert [(label.label, label.token_id, label.tokens) for label in engine.labels] == [
        ("def", 320, 1),
        ("class", 499, 1),
    ]
    assert engine.to_json()["labels"][1] == {"label": "class", "token_id": 499, "token": "class", "tokens": 1}
    assert "label 'def': token 320 ('def')" in engine.describe()
    seen = enginesmith.inspect(engine.path)
    assert seen.to_json()["manifest"]["task"] == {
        "kind": "classify",
        "labels": ["def", "class"],
        "token_ids": [320, 499],
    }
    assert "task       classify def (token 320), class (token 499)" in seen.describe()
    assert seen.manifest.source.config.vocab_size == seen.manifest.source.config.head_size == 4096
    assert seen.manifest.source.config.tie_word_embeddings and seen.manifest.config.head_size == 2
    assert seen.manifest.source_digest == Checkpoint.open(EXAMPLE).digest


def test_verify_compare_and_the_page(engine: enginesmith.BuildOutcome, tmp_path: Path) -> None:
    report = enginesmith.verify(engine.path, against=EXAMPLE, report=tmp_path / "report.html")
    assert report.passed and "Same label" in (tmp_path / "report.html").read_text()
    found = enginesmith.compare([engine.path], against=EXAMPLE, report=tmp_path / "compare.html")
    row = found.engines[0]
    assert row["decode_tokens_per_s"] is row["perplexity_engine"] is None and row["top1_agreement"] is not None
    assert found.describe()


def test_the_command_line(engine: enginesmith.BuildOutcome) -> None:
    done = command("run", engine.path, "--prompt", TEXTS[0], "--json")
    assert done.code == 0 and done.json.keys() == {"prompt_ids", "label", "token_id", "probabilities", "logits"}
    assert sum(done.json["probabilities"].values()) == pytest.approx(1)
    shown = command("run", engine.path, "--prompt-ids", ",".join(map(str, done.json["prompt_ids"])))
    assert shown.out.splitlines()[0] == done.json["label"]
    refused = command("run", engine.path, "--prompt", "a", "--temperature", "0.5", "--json")
    assert refused.code == 2 and refused.json["error"]["kind"] == "run.task"


def test_plan_foretells_the_engine(engine: enginesmith.BuildOutcome) -> None:
    forecast = enginesmith.plan(
        EXAMPLE, target=engine.manifest.target, recipe="int8-weight", max_seq_len=128, task="classify", labels=LABELS
    )
    assert forecast.to_json()["labels"] == engine.to_json()["labels"]
    assert forecast.engine_bytes == pytest.approx(engine.manifest.total_bytes, rel=0.05)
    assert forecast.coverage.to_json() == engine.coverage.to_json()
    heads = [tensor.shape for tensor in forecast.coverage.tensors if tensor.name == "lm_head.weight"]
    assert heads == [(2, 256)]


def test_one_text_of_labels_is_split_as_on_the_command_line() -> None:
    forecast = enginesmith.plan(EXAMPLE, target="onnxruntime", task="classify", labels="def,class")
    assert [label.label for label in forecast.labels] == list(LABELS)


def test_labels_and_task_go_together() -> None:
    for arguments in (["--task", "classify"], ["--labels", "a,b"], ["--task", "rank"]):
        done = command("plan", EXAMPLE, "--target", "onnxruntime", *arguments, "--json")
        assert (done.code, done.json["error"]["kind"]) in {(2, "usage.labels"), (2, "usage.task")}
    shared = command("plan", EXAMPLE, "--target", "onnxruntime", "--task", "classify", "--labels", "def,#320", "--json")
    assert (shared.code, shared.json["error"]["kind"]) == (2, "labels.shared")


def test_engines_of_other_tasks_are_not_compared(
    tiny_checkpoint: Factory, tmp_path: Path, engine: enginesmith.BuildOutcome
) -> None:
    plain = enginesmith.build(EXAMPLE, target="onnxruntime", out=tmp_path / "plain", max_seq_len=64, parity=False)
    with pytest.raises(enginesmith.InputError) as caught:
        enginesmith.compare([engine.path, plain.path], against=EXAMPLE)
    assert caught.value.kind == "compare.task"


@pytest.mark.parametrize(("shape", "rotate"), [("gqa", False), ("tied", True)])
def test_one_calibration_serves_generators_and_classifiers(
    tiny_checkpoint: Factory, tmp_path: Path, shape: str, rotate: bool
) -> None:
    """The file is the plain checkpoint's; the classifier is verified with it, its simulation included."""
    checkpoint = tiny_checkpoint(shape, hidden_size=128, intermediate_size=256, gain=0.3, rms_norm_eps=1e-5)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": Path(__file__).read_text()}))
    enginesmith.calibrate(
        checkpoint, recipe="int4-gptq", out=tmp_path / "q", calibration=text, calibration_tokens=512, rotate=rotate
    )
    outcome = enginesmith.build(
        checkpoint,
        target="onnxruntime",
        out=tmp_path / "engine",
        qparams=tmp_path / "q",
        max_seq_len=64,
        task="classify",
        labels=["#7", "#300"],
    )
    assert outcome.report is not None and outcome.report.passed and outcome.report.proof.simulation is True
    again = enginesmith.verify(outcome.path, against=checkpoint, qparams=tmp_path / "q")
    assert again.passed and again.proof.simulation is True
    alone = enginesmith.verify(outcome.path, against=checkpoint)
    assert alone.proof.simulation is None and alone.nothing_failed
