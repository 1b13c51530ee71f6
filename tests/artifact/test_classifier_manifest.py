"""The task in a manifest: what is written comes back; labels that cannot be are damage."""

import hashlib
import json

import pytest

from exporter.artifact.json_fields import canonical_json
from exporter.artifact.manifest import SEAL, decode_manifest, encode_manifest
from exporter.core.errors import ArtifactError
from exporter.core.task import Task
from tests.artifact.sample import manifest

TASK = Task("classify", ("safe", "日本"), (7, 319))


def tampered(task: dict[str, object]) -> bytes:
    """A manifest with this task, sealed again."""
    value = json.loads(encode_manifest(manifest(task=TASK)))
    value["task"] = task
    del value[SEAL]
    return canonical_json({**value, SEAL: hashlib.sha256(canonical_json(value)).hexdigest()})


def test_a_task_comes_back() -> None:
    written = manifest(task=TASK)
    found = decode_manifest(encode_manifest(written))
    assert found.to_json() == written.to_json() and found.task == TASK
    assert (found.config.head_size, found.source.config.head_size) == (2, 320)
    assert encode_manifest(found) == encode_manifest(written)
    plain = decode_manifest(encode_manifest(manifest()))
    assert plain.config == plain.source.config


@pytest.mark.parametrize(
    "task",
    [
        {"kind": "classify", "labels": ["a", "b"], "token_ids": [1, 320]},
        {"kind": "classify", "labels": ["a", "b"], "token_ids": [1]},
        {"kind": "classify", "labels": [], "token_ids": []},
        {"kind": "generate", "labels": ["a"], "token_ids": [1]},
        {"kind": "rank", "labels": [], "token_ids": []},
        {"kind": "classify", "labels": ["a", "b"], "token_ids": [1, True]},
        {"kind": "classify", "labels": ["a", "b"], "token_ids": [-1, 1]},
    ],
)
def test_impossible_tasks_are_damage(task: dict[str, object]) -> None:
    with pytest.raises(ArtifactError) as caught:
        decode_manifest(tampered(task))
    assert caught.value.kind == "artifact.manifest"
