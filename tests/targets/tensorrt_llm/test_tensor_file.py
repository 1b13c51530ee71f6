"""Files written piece by piece are read back by the safetensors library."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from targets.tensorrt_llm.tensor_file import TensorFile, TensorSpec, plan_shards

BF16 = np.dtype(ml_dtypes.bfloat16)


def test_pieces_in_any_order_are_the_whole(tmp_path: Path) -> None:
    path, random = tmp_path / "a.safetensors", np.random.default_rng(0)
    matrix = random.standard_normal((6, 10)).astype(np.float32)
    half, codes = random.standard_normal(5).astype(BF16), random.integers(0, 256, (4, 3)).astype(np.uint8)
    specs = [
        TensorSpec("m", "F32", (6, 10)),
        TensorSpec("h", "BF16", (5,)),
        TensorSpec("s", "F32", ()),
        TensorSpec("e", "F8_E4M3", (4, 3)),
        TensorSpec("n", "I64", (2,)),
    ]
    with TensorFile.create(path, specs, {"format": "pt"}) as file:
        file.write("n", 0, np.array([6, 10]))
        file.write("e", 2, codes[2:])
        file.write_columns("m", 2, 4, matrix[2:, 4:])
        file.write("m", 0, matrix[:2])
        file.write_columns("m", 2, 0, matrix[2:, :4])
        file.write("e", 0, codes[:2])
        file.write("h", 0, half)
        file.write("s", 0, np.float32(0.5).reshape(()))
    found = load_file(path)
    assert np.array_equal(found["m"].numpy(), matrix)
    assert torch.equal(found["h"].view(torch.uint16), torch.from_numpy(half.view(np.uint16)))
    assert found["s"].shape == () and float(found["s"]) == 0.5
    assert found["e"].dtype == torch.float8_e4m3fn and np.array_equal(found["e"].view(torch.uint8).numpy(), codes)
    assert found["n"].tolist() == [6, 10]
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "F32", (2,)), TensorSpec("b", "F32", (2,))]
    with pytest.raises(ValueError, match="'b'"), TensorFile.create(tmp_path / "f", specs) as file:
        file.write("a", 0, np.zeros(2, np.float32))


@pytest.mark.parametrize(
    ("first", "values"),
    [(0, np.zeros((2, 3), np.float64)), (0, np.zeros((2, 4), np.float32)), (3, np.zeros((2, 3), np.float32))],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, first: int, values: np.ndarray) -> None:
    with TensorFile.create(tmp_path / "f", [TensorSpec("a", "F32", (4, 3))]) as file:
        with pytest.raises(ValueError, match="a: "):
            file.write("a", first, values)
        file.write("a", 0, np.zeros((4, 3), np.float32))


def test_shards_keep_the_order_and_the_limit() -> None:
    specs = [TensorSpec(name, "U8", (size,)) for name, size in (("a", 4), ("b", 4), ("c", 20), ("d", 1))]
    assert [[spec.name for spec in shard] for shard in plan_shards(specs, 8)] == [["a", "b"], ["c"], ["d"]]
