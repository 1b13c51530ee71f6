"""Against modelopt's own exports of the same checkpoint: byte for byte where the format is exact, and read back."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from exporter.core.canonical import CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import ArtifactError
from exporter.core.weights import QuantizedRows
from targets.base import BuildSource
from targets.tensorrt_llm.trtllm_reader import open_trtllm
from tests.support.tiny import write_checkpoint
from tests.targets.tensorrt_llm.trtllm_sources import SHAPE, recipe_of, source_of, written

if find_spec("modelopt") is None:
    pytest.skip("nvidia-modelopt is not installed", allow_module_level=True)

CASES = [
    *("bf16-1-1", "bf16-2-2", "FP8-1-1", "FP8-2-1", "FP8-4-1", "FP8-1-2", "FP8_KV-2-1"),
    *("FP8_PER_CHANNEL_PER_TOKEN-2-1", "W8A8_SQ_PER_CHANNEL-2-1", "W8A8_SQ_PER_CHANNEL-4-1"),
    *("W4A16_AWQ-1-1", "W4A16_AWQ-2-1", "W4A16_AWQ-2-2", "W4A8_AWQ-2-1"),
]
READ = ["FP8-4-1", "FP8_KV-2-1", "FP8_PER_CHANNEL_PER_TOKEN-2-1", "SMOOTHQUANT-2-1", "AWQ-2-1"]
IDS = torch.arange(64).reshape(2, 32) * 5 % 333
TOPS = {"int8": np.float32(127), "int4": np.float32(7), "fp8": np.float32(448)}
# modelopt leaves them out with transformers 5, or writes float16: said in targets/tensorrt_llm/trtllm_config.py.
OUR_OWN = {"producer", "logits_dtype", "rotary_base", "rotary_scaling", "attn_bias", "mlp_bias"}
WITH_OWN_SCALE = ("o_proj.weight", "down_proj.weight")
RESMOOTHED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
E4M3_STEP, E4M3_LEAST = 2.0**-3, 2.0**-9 / 448
"""Between two numbers of E4M3; between the smallest ones, where the largest is 1."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of two heads: tp 4 repeats them. Two layers: modelopt's stages are of equal size."""
    shape = {**SHAPE, "num_hidden_layers": 2, "num_key_value_heads": 4}
    return write_checkpoint(tmp_path_factory.mktemp("llama"), gain=0.5, **shape)


@pytest.fixture(scope="module")
def exports(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases by one process of its own: modelopt changes torch's modules."""
    out = tmp_path_factory.mktemp("modelopt")
    program = Path(__file__).with_name("modelopt_rank_files.py")
    done = subprocess.run(
        [sys.executable, program, checkpoint, out, *dict.fromkeys([*CASES, *READ])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def amax(checkpoint: Path) -> dict[str, float]:
    """Largest magnitude of each matrix's input, as the bfloat16 model has it."""
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    found: dict[str, float] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs: found.update({name: float(inputs[0].abs().max())})

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(IDS)
    return found


def split(case: str) -> tuple[str, int, int]:
    name, tp, pp = case.split("-")
    return name, int(tp), int(pp)


def rounded_as_modelopt(checkpoint: Checkpoint, weight: CheckpointWeight, start: int, stop: int) -> QuantizedRows:
    """Integers with plain float32 scales max|w| / 7 or 127: the writer is compared, not how scales are found."""
    values = checkpoint.read_rows(weight.sources[0], start, stop).astype(np.float32)
    groups = values.reshape(len(values), -1, weight.precision.group_of(values.shape[1]))
    scales = np.abs(groups).max(axis=2) / TOPS[weight.precision.kind]
    codes = np.rint(groups / scales[:, :, None]).astype(np.int8).reshape(values.shape)
    return QuantizedRows(codes, scales, None, weight.precision)


def ours(checkpoint: Path, case: str, amax: dict[str, float], out: Path) -> BuildSource:
    name, tp, pp = split(case)
    kv_cache = "fp8" if name == "FP8_KV" else "bf16"
    recipe = recipe_of(name.removesuffix("_KV"), kv_cache)
    top = 127 if recipe.linear.activations.startswith("int8") else 448
    scales = {module: float(np.float32(largest) / np.float32(top)) for module, largest in amax.items()}
    plain = source_of(checkpoint, recipe, tp, pp, input_scales=scales, kv_scales={0: (0.003, 0.002), 1: (0.1, 0.9)})

    def rows(weight: CheckpointWeight, start: int, stop: int) -> "np.ndarray | QuantizedRows":
        if weight.precision.is_integer:
            return rounded_as_modelopt(plain.checkpoint, weight, start, stop)
        return plain.rows(weight, start, stop)

    source = replace(plain, rows=rows)
    written(source, out)
    return source


@pytest.mark.parametrize("case", CASES)
def test_rank_files_are_modelopts(
    checkpoint: Path, exports: Path, amax: dict[str, float], tmp_path: Path, case: str
) -> None:
    name, tp, pp = split(case)
    ours(checkpoint, case, amax, tmp_path / "out")
    padded = ("vocab_embedding.weight", "lm_head.weight") if name.startswith("W4") else ()
    for rank in range(tp * pp):
        found = load_file(tmp_path / "out" / f"rank{rank}.safetensors")
        wanted = load_file(exports / case / f"rank{rank}.safetensors")
        # Without a search modelopt writes no factors of inputs, which TensorRT-LLM asks for: ours are ones.
        extra = {key for key in found.keys() - wanted.keys() if not key.endswith("prequant_scaling_factor")}
        assert not extra and not wanted.keys() - found.keys()
        for key, theirs in wanted.items():
            if not key.endswith(padded):  # filled up to a multiple of 64 there, where nothing asks for it
                same(key, found[key], theirs)
        assert all((found[key] == 1).all() for key in found.keys() - wanted.keys())


def same(key: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), key
    if key.endswith(("weight", "bias")):
        assert found.view(torch.uint8).equal(wanted.view(torch.uint8)), key
        return
    rtol = 1e-4 if key.endswith(("activation_scaling_factor", "cache_scaling_factor")) else 1e-6
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0, msg=lambda said: f"{key}: {said}")


@pytest.mark.parametrize("case", CASES)
def test_configs_are_modelopts_but_for_what_it_forgets(
    checkpoint: Path, exports: Path, amax: dict[str, float], tmp_path: Path, case: str
) -> None:
    name, _, _ = split(case)
    ours(checkpoint, case, amax, tmp_path / "out")
    found, wanted = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", exports / case))
    if name == "FP8_PER_CHANNEL_PER_TOKEN":
        # A list replaces TensorRT-LLM's own, and the last norm would return E4M3.
        assert found["quantization"].pop("exclude_modules") == ["lm_head", "*ln_f", "*ln_embed"]
        assert wanted["quantization"].pop("exclude_modules") == ["lm_head"]
    if name.startswith("W4"):
        assert wanted.pop("vocab_size") == 384
        found.pop("vocab_size")
    for config in (found, wanted):
        # Its plain int4 calls the factors of inputs absent, as they are there.
        config["quantization"].pop("pre_quant_scale", None)
    assert {key: value for key, value in found.items() if key not in OUR_OWN} == {
        key: value for key, value in wanted.items() if key not in OUR_OWN
    }


@pytest.mark.parametrize("case", READ)
def test_our_reader_decodes_modelopts_files(checkpoint: Path, exports: Path, case: str) -> None:
    """To the weights that modelopt's fake quantization multiplies with."""
    opened = Checkpoint.open(checkpoint)
    config = replace(opened.config, vocab_size=384) if case.startswith("AWQ") else opened.config
    stored = open_trtllm(exports / case, config, recipe_of("FP8"))
    stored.validate()
    for key, weight in load_file(exports / case / "weights.safetensors").items():
        found, wanted = stored.rows(key, 0, len(weight)), weight.numpy()
        if case.startswith(("FP8-", "FP8_KV-")) and not key.endswith(WITH_OWN_SCALE):
            # Rounded anew for the scale of the pack: to a neighbouring number of E4M3 at most.
            np.testing.assert_allclose(found, wanted, rtol=E4M3_STEP, atol=np.abs(wanted).max() * E4M3_LEAST)
        elif case.startswith("AWQ") and key.endswith(RESMOOTHED):
            # The exporter gives q, k and v one factor of inputs and rounds them anew: int4 errs by an eighth at most,
            # swapped nibbles or rows by more than the weights themselves.
            weights = opened.read(key).astype(np.float32)
            assert np.linalg.norm(found - weights) < 0.125 * np.linalg.norm(weights)
        else:
            same_but_for_ties(found, wanted, opened.read(key).astype(np.float32), key)


def same_but_for_ties(found: np.ndarray, wanted: np.ndarray, weights: np.ndarray, key: str) -> None:
    """modelopt's fake quantization multiplies with the inverse scale where its exporter divides: weights halfway
    between two codes, of which bfloat16 has some, may take the other one. Factors of inputs cost a rounding more."""
    apart = ~np.isclose(found, wanted, rtol=1e-6, atol=0)
    assert apart.mean() < 1e-2, key
    np.testing.assert_allclose((found + wanted)[apart] / 2, weights[apart], rtol=2.0**-7, err_msg=key)


def test_exports_without_factors_of_inputs_are_found_incomplete(checkpoint: Path, exports: Path) -> None:
    """`Int8SmoothQuantLinear` has a parameter for them: TensorRT-LLM does not load such files."""
    config = Checkpoint.open(checkpoint).config
    with pytest.raises(ArtifactError, match="prequant_scaling_factor") as caught:
        open_trtllm(exports / "W8A8_SQ_PER_CHANNEL-2-1", config, recipe_of("FP8")).validate()
    assert caught.value.kind == "stored.tensor_missing"
