"""The weights file: exact bytes, places, sharing, determinism, streaming, a full disk."""

import errno
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from exporter.core.canonical import CheckpointWeight, RotaryTable
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import InputError, UnsupportedError
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows
from targets.base import BuildSource, RowReader
from targets.tvm import weight_file
from targets.tvm.isa import PROFILES, Isa
from targets.tvm.stored import StoredWeight, packed_layout
from targets.tvm.weight_file import ALIGNMENT, WeightPlan, plan_weights, write_weights
from tests.support.tiny import SHAPES
from tests.targets.engines import RECIPES, build_source
from tests.targets.tvm.builds import lowered, tvm_source

ISA = PROFILES["x86-64-v3"]
NAME = "model.layers.0.mlp.gate_proj.weight"


def planned(source: BuildSource, isa: Isa = ISA) -> WeightPlan:
    model = lowered(source, isa.name)
    return plan_weights((stored for part in model.slices for stored in part.stored), source.checkpoint, isa)


def write(path: Path, plan: WeightPlan, checkpoint: Checkpoint, rows: RowReader, threads: int = 1) -> bytes:
    write_weights(path, plan, checkpoint, ISA, rows, lambda fraction, name: None, threads)
    return path.read_bytes()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_tensor_holds_its_packed_weight(tiny_checkpoint, tmp_path, recipe):
    source = tvm_source(tiny_checkpoint("biases"), recipe)
    plan = planned(source)
    data = write(tmp_path / "weights", plan, source.checkpoint, source.rows)
    assert len(data) == plan.nbytes
    for tensor in plan.tensors.values():
        found = np.frombuffer(data[tensor.offset : tensor.offset + tensor.nbytes], np.uint8)
        assert np.array_equal(found, expected(source, tensor.stored).view(np.uint8).reshape(-1))


def expected(source: BuildSource, stored: StoredWeight) -> np.ndarray:
    """All bytes of a weight at once."""
    weight = stored.weight
    if isinstance(weight, RotaryTable):
        return weight.values()
    packed = packed_layout(stored, source.checkpoint, ISA)
    if packed is None:
        length = sum(source.checkpoint.tensors[name].shape[0] for name in weight.sources)
        return np.asarray(source.rows(weight, 0, length)).astype(np.float32)
    return packed.pack(0, packed.blocks, lambda start, stop: source.rows(weight, start, stop))


@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_lie_on_pages_and_do_not_overlap(tiny_checkpoint, shape):
    plan = planned(tvm_source(tiny_checkpoint(shape), "mixed"))
    tensors = list(plan.tensors.values())
    assert all(tensor.offset % ALIGNMENT == 0 for tensor in tensors)
    for before, after in pairwise(tensors):
        assert 0 <= after.offset - before.offset - before.nbytes < ALIGNMENT
    assert plan.weights_bytes == sum(tensor.nbytes for tensor in tensors) <= plan.nbytes


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "int8", "int6", "int4", "int4-asym"])
def test_a_tied_head_shares_the_bytes_of_its_table(tiny_checkpoint, recipe):
    source = tvm_source(tiny_checkpoint("tied"), recipe)
    model, plan = lowered(source), planned(source)
    names = [[plan.names[stored] for stored in part.stored] for part in (model.embedding, model.head)]
    assert names == [["embed_tokens.weight"], ["norm.weight", "embed_tokens.weight"]]
    assert "lm_head.weight" not in plan.tensors


def test_untied_or_mixed_heads_and_their_tables_lie_apart(tiny_checkpoint):
    for shape, recipe in (("gqa", "int4"), ("tied", "mixed")):
        assert {"embed_tokens.weight", "lm_head.weight"} <= set(
            planned(tvm_source(tiny_checkpoint(shape), recipe)).tensors
        )


def test_layers_share_their_rotary_tables(tiny_checkpoint):
    plan = planned(tvm_source(tiny_checkpoint("mqa_three_layers"), "fp32"))
    assert [name for name in plan.tensors if "rotary" in name] == [
        "layers.0.rotary.cos_cache", "layers.0.rotary.sin_cache",
    ]  # fmt: skip


def test_two_weights_of_one_name_lie_apart(tiny_checkpoint):
    checkpoint = Checkpoint.open(tiny_checkpoint("gqa"))
    weights = [
        StoredWeight("w", CheckpointWeight((NAME,), precision)) for precision in (Precision(), Precision("bf16"))
    ]
    assert list(plan_weights(weights, checkpoint, ISA).tensors) == ["w", "w.1"]


def test_the_bytes_do_not_depend_on_threads_or_chunks(tiny_checkpoint, tmp_path, monkeypatch):
    source = tvm_source(tiny_checkpoint("odd_vocabulary"), "int4")
    plan = planned(source)
    whole = write(tmp_path / "a", plan, source.checkpoint, source.rows)
    monkeypatch.setattr(weight_file, "CHUNK_ELEMENTS", 1)
    assert write(tmp_path / "b", plan, source.checkpoint, source.rows, threads=3) == whole


class Recorder:
    """A row reader that remembers how many elements it was asked for at once."""

    def __init__(self, rows: RowReader) -> None:
        self._rows, self.largest = rows, 0

    def __call__(self, weight: CheckpointWeight, start: int, stop: int) -> np.ndarray | QuantizedRows:
        rows = self._rows(weight, start, stop)
        self.largest = max(self.largest, rows.codes.size if isinstance(rows, QuantizedRows) else rows.size)
        return rows


def test_no_more_than_a_chunk_is_read_at_once(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_file, "CHUNK_ELEMENTS", 4096)
    source = tvm_source(tiny_checkpoint("gqa"), "int4")
    recorder = Recorder(source.rows)
    write(tmp_path / "weights", planned(source), source.checkpoint, recorder)
    assert 0 < recorder.largest <= 4096


def test_progress_ends_at_one_and_names_tensors(tiny_checkpoint, tmp_path):
    source = build_source(tiny_checkpoint("gqa"), RECIPES["int8"])
    told: list[tuple[float, str]] = []
    write_weights(
        tmp_path / "w", planned(source), source.checkpoint, ISA, source.rows, lambda *report: told.append(report)
    )
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)
    assert "layers.1.mlp.down_proj.weight" in {name for _, name in told}


def test_a_full_disk_is_bad_input_with_a_remedy(tiny_checkpoint, tmp_path, monkeypatch):
    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = tvm_source(tiny_checkpoint("gqa"), "int4")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match="No space left") as error:
        write(tmp_path / "weights", planned(source), source.checkpoint, source.rows, threads=2)
    assert "disk space" in error.value.remedy


def test_what_a_reader_raises_ends_the_write(tiny_checkpoint, tmp_path):
    def broken(weight: CheckpointWeight, start: int, stop: int) -> np.ndarray:
        raise UnsupportedError("recipe.overflow", "too large", "")

    source = tvm_source(tiny_checkpoint("gqa"), "fp16")
    with pytest.raises(UnsupportedError, match="too large"):
        write(tmp_path / "weights", planned(source), source.checkpoint, broken, threads=2)
