"""The files that an artifact gets: the same for the same engine, nothing of this machine, accepted by `load`."""

import json
from pathlib import Path

import pytest

from exporter.artifact.load import open_artifact
from exporter.artifact.manifest import MANIFEST, write_manifest
from exporter.handoff.files import INDEX, PAGE, handoff_files, write_handoff
from tests.artifact.sample import manifest, write_artifact
from tests.handoff.samples import write_json


def test_an_artifact_with_its_hand_off_is_whole(tmp_path: Path) -> None:
    directory = write_artifact(tmp_path / "engine")
    write_handoff(manifest(), directory)
    (directory / MANIFEST).unlink()
    complete, _ = write_manifest(directory, manifest())
    assert set(handoff_files(manifest(), directory)) < {entry.path for entry in complete.files}
    assert open_artifact(directory).manifest.files == complete.files


def test_two_engines_alike_get_the_same_bytes_wherever_they_lie(tmp_path: Path) -> None:
    files = [handoff_files(manifest(), write_artifact(tmp_path / name)) for name in ("one", "two")]
    assert files[0] == files[1]
    assert not [name for name, text in files[0].items() if str(tmp_path) in text]


def test_the_index_is_json_with_every_route(tmp_path: Path) -> None:
    value = json.loads(handoff_files(manifest(), tmp_path)[INDEX])
    assert (value["format"], value["target"], value["task"], value["labels"]) == (1, "onnxruntime", "generate", [])
    assert value["limits"] == {"max_batch": 2, "max_seq_len": 64}
    assert [route["name"] for route in value["routes"]] == ["enginesmith", "python", "triton", "onnxruntime-genai"]
    assert value["routes"][0]["commands"][0] == ["enginesmith", "inspect", "ENGINE_DIR", "--for-host"]


@pytest.mark.parametrize(
    ("proof", "sentence"),
    [
        ({"built_by": "onnxruntime 1.31.1"}, "Built by onnxruntime 1.31.1. manifest.json has"),
        ({"statement": "built by X for SM89; the engine was not run"}, "Built by X for SM89; the engine was not run. "),
    ],
)
def test_the_page_says_what_was_proven(tmp_path: Path, proof: dict[str, object], sentence: str) -> None:
    assert sentence in handoff_files(manifest(proof=proof), tmp_path)[PAGE]


def test_the_page_has_a_section_for_each_way_and_the_code_compiles(tmp_path: Path) -> None:
    page = handoff_files(manifest(), tmp_path)[PAGE]
    titles = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    wanted = ["The command line", "Python", "Triton Inference Server", "onnxruntime-genai", "Triton's own backends"]
    assert titles == wanted
    for block in page.split("```python\n")[1:]:
        compile(block.split("```")[0], "page", "exec")


def test_a_checkpoint_gets_commands_and_no_triton_repository(tmp_path: Path) -> None:
    quantized = {"quantization": {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None}}
    write_json(tmp_path, config={"dtype": "bfloat16"}, hf_quant_config=quantized)
    files = handoff_files(manifest(target="tensorrt-llm"), tmp_path)
    assert set(files) == {PAGE, INDEX}
    assert "trtllm-serve ENGINE_DIR --backend pytorch" in files[PAGE]
    assert "## Who does not take it\n\n- vLLM: its ModelOpt loader has no W4A16_AWQ" in files[PAGE]
    assert json.loads(files[INDEX])["checkpoint"] == {"form": "hf", "algorithm": "W4A16_AWQ"}
