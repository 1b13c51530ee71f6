"""engine.json: written and read back, and refused where it is damaged."""

import json

import pytest

from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import ArtifactError
from targets.tensorrt.engine_index import EngineIndex, StepProfile
from targets.tensorrt.file_names import INDEX
from tests.targets.tensorrt.contract_engines import contract_index


@pytest.fixture(params=[(), (3, 5)], ids=["generate", "classify"])
def index(request, tiny_checkpoint) -> EngineIndex:
    return contract_index(Checkpoint.open(tiny_checkpoint("gqa")), labels=request.param)


def test_it_reads_what_it_wrote(index, tmp_path):
    index.write(tmp_path)
    assert EngineIndex.read(tmp_path) == index
    assert index.has_cache == (index.task == "generate")
    assert len(index.cache_names) == (2 * index.num_layers if index.has_cache else 0)
    assert index.hidden_names == ["layers.0.hidden", "layers.1.hidden", "final.hidden"]


def damaged(data: dict, **changes: object) -> str:
    return json.dumps({**data, **changes})


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"toolkit": "other"},
        {"arithmetic": "fp32"},
        {"cache_type": 16},
        {"num_layers": 0},
        {"num_layers": True},
        {"outputs": "320"},
        {"cache_length": -8},
        {"version_compatible": 1},
        {"profiles": []},
        {"profiles": [{"name": "prefill", "batch": [1, 4, 2], "sequence": [1, 1, 1]}]},
        {"profiles": [{"name": "prefill", "batch": [1, 2], "sequence": [1, 1, 1]}]},
        {"profiles": "prefill"},
        {"compute_capabilities": [8.9]},
    ],
    ids=str,
)
def test_a_damaged_index_is_refused(index, tmp_path, change):
    index.write(tmp_path)
    data = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(damaged(data, **change))
    with pytest.raises(ArtifactError, match="cannot be used") as caught:
        EngineIndex.read(tmp_path)
    assert caught.value.kind == "tensorrt.index" and caught.value.exit_code == 5


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}', '{"format": 1, "format": 1}'])
def test_what_is_no_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ArtifactError, match="cannot be used"):
        EngineIndex.read(tmp_path)


def test_a_missing_index_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be used"):
        EngineIndex.read(tmp_path)


def test_profiles_are_ordered_ranges():
    for batch in ((0, 1, 1), (2, 1, 3), (1, 4, 3)):
        with pytest.raises(ValueError, match="profile 'decode'"):
            StepProfile("decode", batch, (1, 1, 1))
