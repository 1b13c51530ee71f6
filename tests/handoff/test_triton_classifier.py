"""The python model of a classifier's repository, against `enginesmith run`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.command import enginesmith
from tests.handoff.engines import LABELS
from tests.handoff.fake_triton import TritonError, request, served

TEXTS = ["def f(x):", "return the sum of them", "a", "b c d"]


@pytest.fixture(scope="module")
def model(classifier: Path) -> Iterator[Any]:
    with served(classifier / "triton" / "enginesmith", threads="1") as loaded:
        yield loaded


def test_answers_are_those_of_the_command_line(classifier: Path, model: Any) -> None:
    done = enginesmith("run", classifier, "--prompt", TEXTS[0], "--json", "--threads", "1")
    assert done.code == 0, done.err
    (answer,) = model.execute([request(TEXTS[:1])])
    assert answer.texts("label") == [done.json["label"]]
    wanted = np.array([[done.json["probabilities"][label] for label in LABELS]], np.float32)
    np.testing.assert_array_equal(answer.outputs()["probabilities"], wanted)


def test_requests_are_answered_together_each_with_its_rows(model: Any) -> None:
    together = model.execute([request(TEXTS[:1]), request(TEXTS[1:])])
    assert [answer.outputs()["probabilities"].shape for answer in together] == [(1, 3), (3, 3)]
    alone = [model.execute([request([text])])[0] for text in TEXTS]
    labels = [label for answer in together for label in answer.texts("label")]
    assert labels == [answer.texts("label")[0] for answer in alone]


def test_a_request_at_fault_is_told_and_the_others_are_answered(model: Any) -> None:
    bad = [request(["a b " * 40]), request([b"\xff"])]
    first, *failed, last = model.execute([request(TEXTS[:1]), *bad, request(TEXTS[:1])])
    assert first.texts("label") == last.texts("label")
    assert [str(answer.error).split(":")[0] for answer in failed] == ["run.too_long", "run.prompt"]
    assert all(answer.error.code == TritonError.INVALID_ARG for answer in failed)


def test_the_graph_for_tritons_own_backend_names_its_labels(classifier: Path) -> None:
    folder = classifier / "triton-native" / "enginesmith_graph"
    assert (folder / "labels.txt").read_text().split() == LABELS
    assert 'label_filename: "labels.txt"' in (folder / "config.pbtxt").read_text()
