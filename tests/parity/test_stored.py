"""Checkpoint artifacts read back: sound ones pass, numbers that were changed in the files are found by name."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.presets import load_recipe
from exporter.core.checkpoint import Checkpoint
from exporter.core.engine_options import EngineOptions
from exporter.core.errors import ArtifactError
from exporter.core.progress import NoProgress
from exporter.core.recipe import Recipe
from exporter.core.safetensors_file import read_whole_header
from exporter.parity.inputs import ParityPlan
from exporter.parity.report import VerifyReport
from exporter.parity.verify import EngineUnderTest, verify_artifact
from exporter.recipe_numbers import RecipeNumbers, plain_numbers
from targets.base import BuildSource, Limits
from targets.tensorrt_llm.target import TensorRtLlmTarget
from targets.tensorrt_llm.tensor_file import DTYPES
from tests.conftest import CheckpointFactory
from tests.support.canonical_llama import canonical_llama

TARGET = TensorRtLlmTarget()
LIMITS = Limits(max_batch=3, max_seq_len=64)
PLAN = ParityPlan(prefill=12, decode=34, single_steps=3, ragged=(10, 6, 3), ragged_steps=2, tail=4)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: CheckpointFactory) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint("gqa", hidden_size=128, intermediate_size=256, gain=0.5))


def recipe_of(source: str, checkpoint: Checkpoint, engine: EngineOptions) -> Recipe:
    return load_recipe(source, complete=lambda r, unnamed: TARGET.complete(r, unnamed, checkpoint.config, engine))


def written(
    checkpoint: Checkpoint, out: Path, recipe: str, form: str | None = None
) -> tuple[EngineUnderTest, RecipeNumbers]:
    engine = EngineOptions(format=form)
    found = recipe_of(recipe, checkpoint, engine)
    numbers = plain_numbers(checkpoint, 1).served(TARGET, found, form)
    model = canonical_llama(checkpoint.config, LIMITS.max_seq_len)
    source = BuildSource(checkpoint.config, found, model, checkpoint, numbers.rows, LIMITS, engine=engine)
    TARGET.build(source, out, NoProgress())
    return EngineUnderTest(TARGET, out, checkpoint, found, LIMITS, threads=1, plan=PLAN), numbers


def values(report: VerifyReport) -> dict[str, float | None]:
    return {check.name: check.value for check in report.checks}


def overwrite(path: Path, name: str, change: bytes) -> None:
    """Put bytes at the start of a tensor."""
    info = read_whole_header(path, DTYPES | {"F8_E4M3": np.dtype(np.uint8)})[1][name]
    with path.open("r+b") as file:
        file.seek(info.offset)
        file.write(change)


def payload(path: Path, name: str) -> bytes:
    """The bytes of a tensor."""
    info = read_whole_header(path, DTYPES | {"F8_E4M3": np.dtype(np.uint8)})[1][name]
    return path.read_bytes()[info.offset : info.offset + info.nbytes]


@pytest.mark.parametrize(
    ("recipe", "form"), [("bf16", None), ("fp8-channel", None), ("fp8-channel", "trtllm"), ("int4-rtn", None)]
)
def test_what_was_written_is_what_the_files_hold(
    checkpoint: Checkpoint, tmp_path: Path, recipe: str, form: str | None
) -> None:
    engine, numbers = written(checkpoint, tmp_path, recipe, form)
    report = verify_artifact(engine, NoProgress(), numbers)
    assert report.passed and report.is_checkpoint
    assert values(report)["stored_weights_error"] == 0.0
    assert report.proof.engine_run is report.proof.stand_in is None
    assert report.proof.simulation is True and "no server has loaded it" in report.proof.statement
    assert values(report)["decode_vs_prefill"] is values(report)["long_position"] is None
    assert (values(report)["kl_divergence_mean"] or 0) > 0 or recipe == "bf16"


def test_a_head_that_was_tied_is_read_back(tiny_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    tied = Checkpoint.open(tiny_checkpoint("tied", hidden_size=128, intermediate_size=256, gain=0.5))
    engine, numbers = written(tied, tmp_path, "fp8-channel", "trtllm")
    assert values(verify_artifact(engine, NoProgress(), numbers))["stored_weights_error"] == 0.0


def test_a_changed_code_is_found_and_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine, numbers = written(checkpoint, tmp_path, "fp8-channel")
    name = "model.layers.1.mlp.up_proj.weight"
    overwrite(tmp_path / "model.safetensors", name, bytes([0x7E] * 64))
    report = verify_artifact(engine, NoProgress(), numbers)
    assert not report.passed and report.first_divergence is not None
    assert (report.first_divergence.layer, report.first_divergence.value) == (1, name)
    # Without the numbers it was written from, codes are not known to the last one.
    blind = verify_artifact(engine, NoProgress(), None)
    assert values(blind)["stored_weights_error"] is None and blind.proof.simulation is None


def test_matrices_in_each_other_s_place_are_found_without_the_numbers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine, _ = written(checkpoint, tmp_path, "fp8-channel")
    sound = verify_artifact(engine, NoProgress(), None)
    assert sound.passed and values(sound)["stored_weights_error"] is None
    assert values(sound)["float_weights_error"] == 0.0
    # E4M3 keeps four bits: at most 2^-4 of any value is lost.
    assert 0 < (values(sound)["rounded_weights_error"] or 0) < 2**-4
    up, gate = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"
    file = tmp_path / "model.safetensors"
    both = {name: payload(file, name) for name in (up, gate)}
    overwrite(file, up, both[gate])
    overwrite(file, gate, both[up])
    report = verify_artifact(engine, NoProgress(), None)
    assert not report.passed and report.first_divergence is not None
    assert report.first_divergence.layer == 1 and report.first_divergence.value in both


def test_a_float_that_is_another_is_found_without_the_numbers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine, _ = written(checkpoint, tmp_path, "int4-rtn")
    overwrite(tmp_path / "model.safetensors", "model.norm.weight", bytes(4))
    report = verify_artifact(engine, NoProgress(), None)
    assert report.first_divergence is not None and report.first_divergence.value == "model.norm.weight"


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_no_format_allows_is_damage(checkpoint: Checkpoint, tmp_path: Path, scale: float) -> None:
    engine, numbers = written(checkpoint, tmp_path, "fp8-channel")
    name = "model.layers.0.self_attn.o_proj.weight_scale"
    overwrite(tmp_path / "model.safetensors", name, np.float32(scale).tobytes())
    with pytest.raises(ArtifactError, match=r"o_proj\.weight_scale") as caught:
        verify_artifact(engine, NoProgress(), numbers)
    assert caught.value.kind.startswith("stored.")


def test_the_cache_is_simulated_as_its_server_rounds_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine, numbers = written(checkpoint, tmp_path, "bf16")
    plain = values(verify_artifact(engine, NoProgress(), numbers))["relative_l2_error"]
    wide = replace(engine, recipe=replace(engine.recipe, kv_cache="fp32"))
    exact = values(verify_artifact(wide, NoProgress(), numbers))["relative_l2_error"]
    assert exact == 0.0 and plain is not None and plain > 1e-4
