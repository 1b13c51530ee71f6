"""The python model of a real engine's repository, driven as Triton drives it, against `enginesmith run`."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifact.load import open_artifact
from exporter.core.errors import ArtifactError
from exporter.handoff.triton_model import Prompt, batches
from exporter.runtime.sampling import Sampling
from tests.cli.command import enginesmith
from tests.handoff.fake_triton import FINAL, TritonError, request, served

PROMPTS = ["def f(x):", "return the sum of them", "a"]


@pytest.fixture(scope="module")
def engine(generator: Path) -> Path:
    return generator


@pytest.fixture(scope="module")
def model(engine: Path) -> Iterator[Any]:
    with served(engine / "triton" / "enginesmith", threads="1") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def streaming(engine: Path) -> Iterator[Any]:
    with served(engine / "triton" / "enginesmith", "configs/streaming.pbtxt", threads="1") as loaded:
        yield loaded


@cache
def run(engine: Path, prompt: str, *options: str) -> dict[str, Any]:
    """`enginesmith run --json`."""
    done = enginesmith("run", engine, "--prompt", prompt, "--json", "--threads", "1", *options)
    assert done.code == 0, done.err
    return done.json


def test_the_repository_lies_in_the_artifact_and_finds_its_engine(engine: Path, model: Any) -> None:
    paths = {entry.path for entry in open_artifact(engine).manifest.files}
    assert "triton/enginesmith/1/model.py" in paths
    assert model._engine.artifact.path == engine.resolve()


def test_answers_are_those_of_the_command_line(engine: Path, model: Any) -> None:
    responses = model.execute([request([prompt], max_new_tokens=8) for prompt in PROMPTS])
    for prompt, response in zip(PROMPTS, responses, strict=True):
        wanted = run(engine, prompt, "--max-new-tokens", "8")
        assert response.texts("text_output") == [wanted["text"]]
        assert response.outputs()["output_ids"].tolist() == [wanted["output_ids"]]
        assert response.texts("finish_reason") == [wanted["finish_reason"]]


def test_rows_of_one_request_and_of_others_are_told_apart(model: Any) -> None:
    together = model.execute([request(PROMPTS[:2], max_new_tokens=5), request(PROMPTS[2:], max_new_tokens=3)])
    alone = model.execute([request([prompt], max_new_tokens=5) for prompt in PROMPTS[:2]])
    assert together[0].texts("text_output") == [response.texts("text_output")[0] for response in alone]
    assert together[1].outputs()["output_ids"].shape == (1, 3)


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(engine: Path, model: Any) -> None:
    options = {"max_new_tokens": 6, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    wanted = run(engine, PROMPTS[0], "--max-new-tokens", "6", "--temperature", "0.8", "--top-p", "0.9", "--seed", "3")
    others = [request([PROMPTS[1]], max_new_tokens=6), request([PROMPTS[2]], **{**options, "seed": 4})]
    answers = model.execute([*others, request([PROMPTS[0]], **options)])
    assert answers[-1].outputs()["output_ids"].tolist() == [wanted["output_ids"]]


def test_more_requests_than_rows(model: Any) -> None:
    answers = model.execute([request([PROMPTS[index % 3]], max_new_tokens=2) for index in range(7)])
    ids = [answer.outputs()["output_ids"].tolist() for answer in answers]
    assert len(ids) == 7 and ids[0] == ids[3] == ids[6]


def test_without_options_the_configuration_decides(engine: Path) -> None:
    with served(engine / "triton" / "enginesmith", threads="1", max_new_tokens="4") as loaded:
        (answer,) = loaded.execute([request(["a"])])
    assert answer.outputs()["output_ids"].shape == (1, 4)


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (request(["a b " * 400], max_new_tokens=2), "run.too_long"),
        (request([b"\xff"]), "run.prompt"),
        (request(["a"], max_new_tokens=-1), "usage.max_new_tokens"),
        (request(["a"], temperature=-1.0), "usage.temperature"),
        (request(["a"], temperature=float("nan")), "usage.temperature"),
    ],
)
def test_a_request_at_fault_is_told_and_the_others_are_answered(model: Any, bad: Any, kind: str) -> None:
    good = request(["a"], max_new_tokens=2)
    before, failed, after = model.execute([good, bad, good])
    assert failed.error.code == TritonError.INVALID_ARG and str(failed.error).startswith(f"{kind}: ")
    assert before.texts("text_output") == after.texts("text_output")


def test_rows_of_a_request_share_their_options(model: Any) -> None:
    mixed = request(["a", "b"], max_new_tokens=2)
    mixed.tensors["max_new_tokens"] = np.array([[2], [3]], np.int32)
    (answer,) = model.execute([mixed])
    assert "run.options" in str(answer.error)


def test_another_engine_than_the_digest_names_is_not_loaded(engine: Path) -> None:
    digest = open_artifact(engine).digest
    with served(engine / "triton" / "enginesmith", digest=digest, threads="1") as loaded:
        assert loaded._engine.digest == digest
    with (
        pytest.raises(ArtifactError, match="expected was"),
        served(engine / "triton" / "enginesmith", digest="0" * 64),
    ):
        pass


def test_a_copied_repository_names_its_engine(engine: Path, tmp_path: Path) -> None:
    import shutil

    copied = Path(shutil.copytree(engine / "triton", tmp_path / "models")) / "enginesmith"
    with served(copied, engine=str(engine), threads="1") as loaded:
        assert loaded.execute([request(["a"], max_new_tokens=1)])[0].error is None


def test_numbers_of_requests_are_those_that_were_typed(model: Any) -> None:
    (prompt,) = model._prompts(request(["a"], temperature=0.8, top_p=0.9, seed=7))
    assert prompt.sampling == Sampling(0.8, 0.9, 7)


def test_bytecode_that_python_leaves_in_the_artifact_is_no_fault(engine: Path) -> None:
    """Triton imports model.py from the artifact before `initialize`."""
    left = engine / "triton" / "enginesmith" / "1" / "__pycache__"
    left.mkdir()
    (left / "model.cpython-312.pyc").write_bytes(b"")
    with served(engine / "triton" / "enginesmith", threads="1") as loaded:
        assert loaded.execute([request(["a"], max_new_tokens=1)])[0].error is None
    assert not left.exists()


def test_streamed_pieces_make_the_text(engine: Path, streaming: Any) -> None:
    asked = request([PROMPTS[0]], max_new_tokens=8)
    assert streaming.execute([asked]) is None
    wanted = run(engine, PROMPTS[0], "--max-new-tokens", "8")
    pieces = [response.texts("text_output")[0] for response, _ in asked.sender.sent]
    assert "".join(pieces) == wanted["text"] and len(pieces) > 1
    last, flags = asked.sender.sent[-1]
    assert flags == FINAL and last is not None
    assert last.outputs()["output_ids"].tolist() == [wanted["output_ids"]]


def test_a_client_that_leaves_ends_its_stream_and_not_the_next(engine: Path, streaming: Any) -> None:
    leaving, staying = request([PROMPTS[0]], patience=1, max_new_tokens=16), request([PROMPTS[0]], max_new_tokens=8)
    streaming.execute([leaving, staying])
    assert len(leaving.sender.sent) == 2 and leaving.sender.sent[-1] == (None, FINAL)
    last = staying.sender.sent[-1][0]
    assert last is not None
    wanted = run(engine, PROMPTS[0], "--max-new-tokens", "8")
    assert last.outputs()["output_ids"].tolist() == [wanted["output_ids"]]


@pytest.mark.parametrize(("texts", "kind"), [(["a b " * 400], "run.too_long"), (["a", "b"], "run.batch")])
def test_a_stream_at_fault_is_told(streaming: Any, texts: list[str], kind: str) -> None:
    asked = request(texts)
    streaming.execute([asked])
    ((response, flags),) = asked.sender.sent
    assert response is not None and str(response.error).startswith(kind) and flags == FINAL


def test_greedy_rows_of_one_limit_run_together_and_rows_that_draw_alone() -> None:
    greedy, drawn = Sampling(), Sampling(temperature=1.0)
    rows = [
        Prompt("a", 4, greedy),
        Prompt("b", 4, drawn),
        Prompt("c", 8, greedy),
        Prompt("d", 4, greedy),
        Prompt("e", 4, greedy),
    ]
    assert batches(rows, 2) == [[0, 3], [4], [2], [1]]
