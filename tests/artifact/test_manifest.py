"""The manifest: round trip, determinism, the published schema, and hostile JSON."""

import hashlib
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from exporter.artifact.calibration_record import CalibrationRecord
from exporter.artifact.json_fields import canonical_json
from exporter.artifact.manifest import (
    SEAL,
    PrecisionTable,
    artifact_digest,
    decode_manifest,
    encode_manifest,
    write_manifest,
)
from exporter.core.config import ModelConfig
from exporter.core.data_summary import DataSummary
from exporter.core.errors import ArtifactError
from exporter.core.recipe import AlgorithmOptions, Override, Precision, Recipe
from exporter.core.task import GENERATE, Task
from tests.artifact.sample import config, manifest, write_files

SCHEMA = Path(__file__).parents[2] / "docs" / "manifest.schema.json"
FP32 = Precision()


def sealed(value: dict[str, Any]) -> bytes:
    """What an attacker writes: any object with a correct seal."""
    return canonical_json({**value, SEAL: hashlib.sha256(canonical_json(value)).hexdigest()})


def kind_of(data: bytes) -> str:
    with pytest.raises(ArtifactError) as caught:
        decode_manifest(data)
    assert caught.value.exit_code == 5 and caught.value.message and caught.value.remedy
    return caught.value.kind


def facts(model: ModelConfig) -> dict[str, object]:
    return {name: value for name, value in vars(model).items() if name != "raw"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": None, "eos_token_id": None, "bos_token_id": None},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 32, "pad_token_id": 7},
    ],
)
def test_round_trip(changes: dict[str, object], tmp_path: Path) -> None:
    write_files(tmp_path)
    source = manifest().source
    given = manifest(source=type(source)(source.digest, config(**changes)), parity=None)
    written, digest = write_manifest(tmp_path, given)
    data = (tmp_path / "manifest.json").read_bytes()
    read = decode_manifest(data)
    assert read.to_json() == written.to_json() and encode_manifest(read) == data
    assert facts(read.source.config) == facts(given.source.config)
    assert digest == artifact_digest(data) == hashlib.sha256(data).hexdigest()
    assert [entry.path for entry in read.files] == [
        "empty.txt",
        "extra/notes.txt",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
    ]


def test_recipes_round_trip() -> None:
    recipe = Recipe("mine", Precision("int4", 32, False), Precision("int8", 16), Precision("bf16"), "fp32")
    assert decode_manifest(encode_manifest(manifest(recipe=recipe))).recipe == recipe
    described = manifest(recipe=recipe).to_json()["recipe"]["description"]
    assert described == "linear int4/g32/asym, lm_head int8/g16, embedding bf16, kv_cache fp32"


def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_files(tmp_path / name)
        write_manifest(tmp_path / name, manifest())
    one, two = ((tmp_path / name / "manifest.json").read_bytes() for name in ("one", "two"))
    assert one == two
    reordered = manifest(toolchain={"b": "2", "a": "1"}), manifest(toolchain={"a": "1", "b": "2"})
    assert encode_manifest(reordered[0]) == encode_manifest(reordered[1])


TEXT = DataSummary("cd" * 32, "text", 12, 65536, 128, 512, 0)
CALIBRATED = CalibrationRecord("ef" * 32, TEXT, ("rotate", "gptq"), {"FoldNorms": 1, "RotateResidual": 1})


@pytest.mark.parametrize("record", [None, CALIBRATED, replace(CALIBRATED, text=None, transforms={})])
def test_calibration_round_trips_and_is_in_the_schema(record: CalibrationRecord | None) -> None:
    mixed = Recipe(
        "auto",
        Precision("int4", 128, activations="int8/token"),
        Precision("fp8", -1, activations="fp8/tensor"),
        Precision("nvfp4", 16),
        "fp8",
        ("rotate", "gptq"),
        AlgorithmOptions(smooth_alpha=0.5),
        (Override("layers.*.mlp.down_proj", Precision("int8", -1)),),
    )
    data = encode_manifest(manifest(recipe=mixed, calibration=record))
    read = decode_manifest(data)
    assert read.recipe == mixed and read.calibration == record and encode_manifest(read) == data
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(json.loads(data))
    if record:
        assert record.describe()


def test_engines_of_schema_1_are_read_still() -> None:
    """As version 1 wrote it: recipes without algorithms, precisions without activations, no calibration."""
    value = manifest().to_json()
    for name in ("calibration", "task", "engine"):
        del value[name]
    for name in ("algorithms", "options", "overrides"):
        del value["recipe"][name]
    for part in ("linear", "lm_head", "embedding"):
        del value["recipe"][part]["activations"]
    read = decode_manifest(sealed({**value, "schema_version": 1}))
    assert read.recipe == manifest().recipe and read.calibration is None


def test_engines_of_schema_2_are_read_still() -> None:
    value = manifest().to_json()
    del value["task"], value["engine"]
    read = decode_manifest(sealed({**value, "schema_version": 2}))
    assert read.task == GENERATE and read.engine == {}


def test_tasks_come_back() -> None:
    classifier = manifest(task=Task("classify", ("safe", "unsafe"), (6, 9)), engine={"profiles": [1, 2]})
    data = encode_manifest(classifier)
    read = decode_manifest(data)
    assert (read.task, read.engine) == (classifier.task, classifier.engine) and encode_manifest(read) == data
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(json.loads(data))


@pytest.mark.parametrize(
    "task",
    [
        {"kind": "sing", "labels": [], "token_ids": []},
        {"kind": "generate", "labels": ["a"], "token_ids": [1]},
        {"kind": "classify", "labels": ["a", "b"], "token_ids": [1]},
        {"kind": "classify", "labels": ["a", "b"], "token_ids": [1, -1]},
        {"kind": "classify", "labels": ["a", "b"], "token_ids": [1, True]},
    ],
)
def test_damaged_tasks_are_refused(task: dict[str, Any]) -> None:
    assert kind_of(sealed({**manifest().to_json(), "task": task})) == "artifact.manifest"


@pytest.mark.parametrize(
    "damage",
    [
        {"qparams": "12"},
        {"transforms": {"FoldNorms": 0}},
        {"text": {**asdict(TEXT), "tokens": -1}},
        {"text": {**asdict(TEXT), "news": 1}},
        {"algorithms": "gptq"},
        {"news": 1},
    ],
)
def test_damaged_calibration_is_refused(damage: dict[str, Any]) -> None:
    value = manifest(calibration=CALIBRATED).to_json()
    assert kind_of(sealed({**value, "calibration": {**value["calibration"], **damage}})) == "artifact.manifest"


def test_the_published_schema_holds_for_real_manifests(tmp_path: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    write_files(tmp_path)
    write_manifest(tmp_path, manifest())
    value = json.loads((tmp_path / "manifest.json").read_text())
    validator.validate(value)
    assert value.keys() == schema["properties"].keys() == set(schema["required"])
    for name in value:
        lacking = {key: item for key, item in value.items() if key != name}
        assert not validator.is_valid(lacking), name


def test_a_newer_schema_is_named() -> None:
    value = manifest().to_json()
    assert kind_of(sealed({**value, "schema_version": 4, "news": 1})) == "artifact.newer"
    assert kind_of(b'{"schema_version": 99}') == "artifact.newer"


def test_every_missing_or_mistyped_field_is_refused() -> None:
    value = manifest().to_json()
    for name, item in value.items():
        assert kind_of(sealed({key: v for key, v in value.items() if key != name})) == "artifact.manifest"
        for wrong in (None, [], {}, "x", -1, 1.5, True, [{}], {"a": {}}, 1 << 62):
            hostile = {**value, name: wrong}
            if type(wrong) is type(item) or (name == "parity" and wrong in (None, {"a": {}}, {})):
                continue
            if name in ("pad_token_id", "bos_token_id") and wrong is None:
                continue
            assert kind_of(sealed(hostile)) in ("artifact.manifest", "artifact.newer"), (name, wrong)


@pytest.mark.parametrize(
    ("section", "name", "wrong"),
    [
        ("source", "architecture", "OtherForCausalLM"),
        ("source", "digest", "AB" * 32),
        ("source", "config", {}),
        ("limits", "max_seq_len", 1 << 40),
        ("limits", "max_batch", 0),
        ("recipe", "kv_cache", None),
        ("recipe", "description", "another one"),
        ("recipe", "linear", {"kind": "int3", "group_size": 32, "symmetric": True}),
        ("recipe", "linear", {"kind": "int4", "group_size": 33, "symmetric": True}),
        ("recipe", "linear", {"kind": "fp32", "group_size": 32, "symmetric": True}),
        ("recipe", "surprise", 1),
        ("coverage", "tensors", [{"name": "x"}]),
        ("coverage", "fraction", "all"),
        ("requirements", "cpu_features", "avx2"),
        ("requirements", "cpu_features", [1]),
        ("toolchain", "onnxruntime", 1),
    ],
)
def test_wrong_values_inside_sections_are_refused(section: str, name: str, wrong: object) -> None:
    value = manifest().to_json()
    assert kind_of(sealed({**value, section: {**value[section], name: wrong}})) == "artifact.manifest"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("hidden_size", 10**18),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("rms_norm_eps", 10**300),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("rope_parameters", []),
        ("head_dim", "16"),
        ("unknown", 1),
    ],
)
def test_impossible_configurations_are_refused(name: str, wrong: object) -> None:
    value = manifest().to_json()
    source = {**value["source"], "config": {**value["source"]["config"], name: wrong}}
    assert kind_of(sealed({**value, "source": source})) == "artifact.manifest"


@pytest.mark.parametrize("ids", [[-1], [320], ["1"], [None], [[1]], [True], [1.0], [1 << 40]])
def test_impossible_token_ids_are_refused(ids: list[object]) -> None:
    assert kind_of(sealed({**manifest().to_json(), "eos_token_ids": ids})) == "artifact.manifest"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "./a",
        "a\\b",
        "C:x",
        "a\x00b",
        "a\nb",
        "x" * 300,
        "manifest.json",
    ],
)
def test_paths_that_leave_the_directory_are_refused(path: str) -> None:
    entry = {"path": path, "bytes": 1, "sha256": "00" * 32, "chunks": []}
    assert kind_of(sealed({**manifest().to_json(), "files": [entry]})) == "artifact.path"


def test_duplicate_paths_are_refused() -> None:
    entry = {"path": "a", "bytes": 1, "sha256": "00" * 32, "chunks": []}
    assert kind_of(sealed({**manifest().to_json(), "files": [entry, entry]})) == "artifact.path"


@pytest.mark.parametrize(
    "wrong",
    [
        {"bytes": -1},
        {"bytes": 1 << 60},
        {"sha256": "xyz"},
        {"chunks": ["00" * 32]},
        {"chunks": None},
        {"bytes": 17 << 20},
        {"bytes": 17 << 20, "chunks": ["00" * 32, "zz"]},
        {"path": 1},
        {"more": 1},
    ],
)
def test_wrong_file_entries_are_refused(wrong: dict[str, object]) -> None:
    entry = {"path": "a", "bytes": 1, "sha256": "00" * 32, "chunks": [], **wrong}
    assert kind_of(sealed({**manifest().to_json(), "files": [entry]})) == "artifact.manifest"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"schema_version": 1, "schema_version": 1}',
        b'{"schema_version": true}',
        b'{"schema_version": 0}',
        b'{"schema_version": 1e400}',
        b'{"schema_version": NaN}',
        b'{"a": ' * 100_000,
        b'{"schema_version": 1, "x": ' + b"[" * 400 + b"]" * 400 + b"}",
        b'{"schema_version": 1, "x": ' + b"9" * 10_000 + b"}",
        b'{"schema_version": 1, "x": ' + b"9" * 400 + b"}",
        b'{"schema_version": 1, "x": "\\ud800"}',
        b'{"schema_version": 1, "\\udfff": 1}',
    ],
    ids=range(16),
)
def test_hostile_json_is_refused(data: bytes) -> None:
    assert kind_of(data) == "artifact.manifest"


SCALARS = [None, True, 0, -1, 1.5, 1 << 62, "", "x", "../x", [], {}, [[]], {"x": None}, "\u0000", 1e300]


def _mutate(value: Any, dice: random.Random) -> Any:
    """A copy with one random place exchanged, removed, renamed or duplicated."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        name = dice.choice(sorted(value))
        match dice.randrange(8):
            case 0:
                return {key: item for key, item in value.items() if key != name}
            case 1:
                return {**value, dice.choice(["x", name + "_"]): value[name]}
            case _:
                return {**value, name: _mutate(value[name], dice)}
    if isinstance(value, list) and value and dice.random() < 0.9:
        index = dice.randrange(len(value))
        changed = [_mutate(value[index], dice)] if dice.random() < 0.8 else [value[index]] * 2
        return [*value[:index], *changed, *value[index + 1 :]]
    return dice.choice(SCALARS)


def test_sealed_mutations_are_read_or_refused_but_never_crash(tmp_path: Path) -> None:
    write_files(tmp_path)
    value = write_manifest(tmp_path, manifest())[0].to_json()
    dice = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(3000):
        mutated = _mutate(value, dice)
        if not isinstance(mutated, dict):
            continue
        try:
            decode_manifest(sealed(mutated))
            outcomes["read"] += 1
        except ArtifactError:
            outcomes["refused"] += 1
    # Opaque parts (parity, proof, signature, versions) may hold anything; most places may not.
    assert outcomes["refused"] > outcomes["read"] > 0


def test_any_other_spelling_is_noticed() -> None:
    data = encode_manifest(manifest())
    decode_manifest(data)
    assert kind_of(data + b" ") == "artifact.manifest"
    assert kind_of(json.dumps(json.loads(data)).encode()) == "artifact.manifest"
    assert kind_of(data.replace(b"0.1.0", b"0.1.1")) == "artifact.manifest"


def test_coverage_comes_from_the_plan_object() -> None:
    tensor = {"name": "w", "requested": "int4/g32", "actual": "fp32", "why": "width"}
    table = PrecisionTable.from_json({"fraction": 0.5, "bits_per_weight": 18.0, "tensors": [tensor]})
    assert (table.fraction, table.tensors[0].why) == (0.5, "width")
