"""Which server takes which checkpoint, with which flags."""

import pytest

from exporter.handoff.files import routes
from exporter.handoff.llm_servers import GPUS, sglang, trtllm_serve, vllm_serve
from exporter.handoff.route import Route, shell
from tests.handoff.samples import checkpoint_facts, facts

HF, COMPRESSED = "hf", "compressed-tensors"


def flags(route: Route) -> dict[str, str]:
    (command,) = route.commands
    start = next(index for index, word in enumerate(command) if word.startswith("--"))
    return dict(zip(command[start::2], command[start + 1 :: 2], strict=True))


def test_fp8_with_its_cache_goes_to_all_three() -> None:
    found = checkpoint_facts(HF, "FP8", fp8_cache=True)
    assert trtllm_serve(found).commands[0][:2] == ("trtllm-serve", "ENGINE_DIR")
    assert flags(trtllm_serve(found)) == {
        "--backend": "pytorch",
        "--max_batch_size": "4",
        "--max_seq_len": "256",
    }
    assert vllm_serve(found).commands[0][:3] == ("vllm", "serve", "ENGINE_DIR")
    assert flags(vllm_serve(found)) == {
        "--quantization": "modelopt",
        "--kv-cache-dtype": "fp8",
        "--max-model-len": "256",
        "--max-num-seqs": "4",
    }
    assert flags(sglang(found)) == {
        "--model-path": "ENGINE_DIR",
        "--quantization": "modelopt_fp8",
        "--kv-cache-dtype": "fp8_e4m3",
        "--context-length": "256",
        "--max-running-requests": "4",
    }


TAKEN = {
    (HF, ""): (True, True, True),
    (HF, "FP8"): (True, True, True),
    (HF, "FP8_PER_CHANNEL_PER_TOKEN"): (True, True, False),
    (HF, "NVFP4"): (True, True, True),
    (HF, "W4A16_AWQ"): (True, False, False),
    (HF, "W4A8_AWQ"): (True, False, False),
    (COMPRESSED, "FP8"): (False, True, True),
    (COMPRESSED, "FP8_PER_CHANNEL_PER_TOKEN"): (True, True, True),
    (COMPRESSED, "W8A8_INT8"): (False, True, True),
    (COMPRESSED, "W4A16"): (False, True, True),
    (COMPRESSED, "W4A8_FP8"): (False, True, False),
    (COMPRESSED, "NVFP4"): (False, True, True),
}


@pytest.mark.parametrize(("form", "algorithm"), TAKEN)
def test_who_takes_what(form: str, algorithm: str) -> None:
    found = routes(checkpoint_facts(form, algorithm))
    assert tuple(route.open for route in found) == TAKEN[form, algorithm]
    for route in found:
        assert bool(route.why) != route.open and route.checked
        assert route.open == route.to_json()["takes_it"]


def test_every_server_is_told_how_to_use_several_gpus() -> None:
    notes = [route.notes[-1] for route in routes(checkpoint_facts(HF, "FP8"))]
    flags = ("--tp_size N", "--tensor-parallel-size N", "--tp-size N")
    assert all(flag in note for flag, note in zip(flags, notes, strict=True))


def test_int8_in_compressed_tensors_is_warned_of_where_it_would_be_misread() -> None:
    assert "would take these int8 codes for FP8" in trtllm_serve(checkpoint_facts(COMPRESSED, "W8A8_INT8")).why


def test_compressed_tensors_is_named_to_vllm_and_found_by_sglang() -> None:
    found = checkpoint_facts(COMPRESSED, "W4A16")
    assert flags(vllm_serve(found))["--quantization"] == "compressed-tensors"
    assert "--quantization" not in flags(sglang(found))


def test_what_is_not_quantized_needs_no_flag() -> None:
    found = checkpoint_facts(HF, "")
    assert all("--quantization" not in flags(route) for route in routes(found))
    assert not any("GPUs that compute" in note for note in trtllm_serve(found).notes)


def test_gpus_are_told_where_known() -> None:
    assert GPUS["NVFP4"] in trtllm_serve(checkpoint_facts(HF, "NVFP4")).notes[0]


def test_ranks_of_a_tensorrt_llm_checkpoint() -> None:
    found = checkpoint_facts("trtllm", "FP8", tensor_parallel=2, pipeline_parallel=2)
    (route,) = routes(found)
    build, serve = route.commands
    assert build[:3] == ("trtllm-build", "--checkpoint_dir", "ENGINE_DIR") and build[-2:] == ("--workers", "4")
    assert serve[:4] == ("trtllm-serve", "trtllm-engine", "--backend", "tensorrt")
    assert serve[serve.index("--tokenizer") + 1] == "ENGINE_DIR"
    (compiled,) = routes(found, compiled=True)
    assert compiled.commands == ((serve[0], "ENGINE_DIR/engine", *serve[2:]),)
    assert "1.2" in compiled.checked


def test_our_runtime_serves_the_rest() -> None:
    names = [route.name for route in routes(facts())]
    assert names == ["enginesmith", "python", "triton", "onnxruntime-genai"]
    assert [route.name for route in routes(facts("tvm"))] == names[:-1]


def test_long_commands_are_broken_before_options() -> None:
    (command,) = vllm_serve(checkpoint_facts(HF, "FP8", fp8_cache=True)).commands
    lines = shell(command).split(" \\\n    ")
    assert lines[0] == "vllm serve ENGINE_DIR" and all(line.startswith("--") for line in lines[1:])
    assert shell(("a", "b c")) == "a 'b c'"
