"""Transformed weights in transformers' own Llama: the logits stay what they were, for every shape and transform."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM

from calibration.transformed import TransformedCheckpoint, with_transforms
from calibration.transforms import (
    POINTS,
    FoldNorms,
    RotateHeads,
    RotateResidual,
    ScaleInput,
    Transform,
    scale_width,
)
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.errors import InputError
from tests.core.raw_safetensors import plant

Factory = Callable[..., Path]

MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {},
    "tied": {},
    "biases": {},
    "head_dim": {},
    "odd_vocabulary": {},
    "mqa_three_layers": {},
    "hidden 96, 3 heads": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3},
    "hidden 160, 5 heads, tied": {
        "hidden_size": 160,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "hidden 30, head 10": {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10},
}


def checkpoint_of(factory: Factory, model: str) -> Checkpoint:
    changes = MODELS[model]
    return Checkpoint.open(factory("gqa" if changes else model, dtype=torch.float32, **changes))


def scales(config: ModelConfig, points: Sequence[str] = POINTS) -> tuple[Transform, ...]:
    """A scale between 1/8 and 8 for every channel of the points of every layer."""
    random = np.random.default_rng(5)
    return tuple(
        ScaleInput(layer, point, np.exp2(random.uniform(-3, 3, scale_width(config, point))).astype(np.float32))
        for layer in range(config.num_layers)
        for point in points
    )


TRANSFORMS: dict[str, Callable[[ModelConfig], tuple[Transform, ...]]] = {
    "fold": lambda config: (FoldNorms(),),
    "rotate residual": lambda config: (FoldNorms(), RotateResidual(1)),
    "rotate heads": lambda config: (RotateHeads(2),),
    **{f"scale {point}": (lambda config, point=point: scales(config, [point])) for point in POINTS},
    "scale, fold, rotate, scale": lambda config: (
        *scales(config),
        FoldNorms(),
        RotateResidual(3),
        RotateHeads(4),
        *scales(config),
        *scales(config, ["mlp_input"]),
    ),
}


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    """Logits of transformers' model in float64 on the checkpoint's weights: what differs, differs in the weights."""
    config = AutoConfig.from_pretrained(checkpoint.path)
    config.tie_word_embeddings = checkpoint.config.tie_word_embeddings
    model = LlamaForCausalLM(config).to(torch.float64).eval()
    state = {name: torch.from_numpy(checkpoint.read(name).astype(np.float64)) for name in checkpoint.tensors}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"} and (not missing or config.tie_word_embeddings)
    ids = torch.randint(0, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize("model", MODELS)
def test_the_function_is_unchanged(tiny_checkpoint: Factory, model: str, transforms: str) -> None:
    original = checkpoint_of(tiny_checkpoint, model)
    transformed = with_transforms(original, TRANSFORMS[transforms](original.config))
    assert transformed.digest == original.digest
    changed = [name for name, info in original.tensors.items() if transformed.tensors[name] != info]
    assert changed, "the transforms changed no tensor: the comparison would prove nothing"
    expected, found = logits(original), logits(transformed)
    # Weights are rounded to float32 (2^-24 relative) on each side that changes; the arithmetic here is float64.
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rotated_weights_are_the_products_with_the_matrix(tiny_checkpoint: Factory) -> None:
    original = checkpoint_of(tiny_checkpoint, "biases")
    transformed = with_transforms(original, (FoldNorms(), RotateResidual(3), RotateHeads(4)))
    raw = {name: original.read(name).astype(np.float64) for name in original.tensors}
    q = _matrix(64, 3)
    r = np.kron(np.eye(2), _matrix(16, 4))
    layer = "model.layers.1."
    gamma = raw[layer + "input_layernorm.weight"]
    value = r.T @ (raw[layer + "self_attn.v_proj.weight"] * gamma) @ q
    output = q.T @ raw[layer + "self_attn.o_proj.weight"] @ np.kron(np.eye(4), _matrix(16, 4))
    expected = {
        "model.embed_tokens.weight": raw["model.embed_tokens.weight"] @ q,
        "lm_head.weight": (raw["lm_head.weight"] * raw["model.norm.weight"]) @ q,
        layer + "self_attn.v_proj.weight": value,
        layer + "self_attn.v_proj.bias": raw[layer + "self_attn.v_proj.bias"] @ r,
        layer + "self_attn.o_proj.weight": output,
        layer + "self_attn.o_proj.bias": raw[layer + "self_attn.o_proj.bias"] @ q,
        layer + "mlp.down_proj.bias": raw[layer + "mlp.down_proj.bias"] @ q,
        layer + "mlp.gate_proj.bias": raw[layer + "mlp.gate_proj.bias"],
        layer + "input_layernorm.weight": np.ones(64),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(
            transformed.read(name), values, rtol=0, atol=2e-7 * np.abs(values).max(), err_msg=name
        )


def _matrix(size: int, seed: int) -> np.ndarray:
    """Q of a power of two, from scipy-free first principles: signs, then Sylvester's matrix."""
    hadamard = np.array([[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]) / np.sqrt(size)
    signs = 1 - 2 * np.random.Generator(np.random.PCG64([seed, size])).integers(0, 2, size)
    return np.asarray(signs[:, None] * hadamard)


@pytest.mark.parametrize("point", POINTS)
def test_powers_of_two_change_no_digit(tiny_checkpoint: Factory, point: str) -> None:
    original = Checkpoint.open(tiny_checkpoint("biases"))
    random = np.random.default_rng(0)
    scale = np.exp2(random.integers(-6, 7, scale_width(original.config, point))).astype(np.float32)
    there = ScaleInput(1, point, scale)
    back = replace(there, scale=1 / scale)
    twice = with_transforms(with_transforms(original, [there]), [back])
    assert isinstance(twice, TransformedCheckpoint) and twice.transforms == (there, back)
    once = with_transforms(original, [there])
    for name in original.tensors:
        stored = original.read(name).astype(np.float32)
        np.testing.assert_array_equal(twice.read(name), stored)
        mantissas, _ = np.frexp(once.read(name))
        np.testing.assert_array_equal(mantissas, np.frexp(stored)[0], err_msg=name)


@pytest.mark.parametrize("model", ["biases", "hidden 30, head 10"])
def test_rows_do_not_depend_on_how_they_are_read(tiny_checkpoint: Factory, model: str) -> None:
    original = checkpoint_of(tiny_checkpoint, model)
    transforms = TRANSFORMS["scale, fold, rotate, scale"](original.config)
    whole = with_transforms(original, transforms)
    names = list(whole.tensors)
    random = np.random.default_rng(1)
    parts = with_transforms(original, transforms)

    def read(name: str) -> None:
        rows = whole.tensors[name].shape[0]
        cuts = sorted({0, rows, *random.integers(0, rows + 1, 4).tolist()})
        found = [parts.read_rows(name, low, high) for low, high in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(found), whole.read(name), err_msg=name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, names * 3))


def test_matrices_are_read_once_or_in_portions(tiny_checkpoint: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads that want the rows of a matrix whose rows mix wait for one computation; others read what they
    need."""
    original = Checkpoint.open(tiny_checkpoint("gqa"))
    rotated = with_transforms(original, (FoldNorms(), RotateResidual(), RotateHeads()))
    rows_read: Counter[str] = Counter()
    read_rows = Checkpoint.read_rows

    def counting(self: Checkpoint, name: str, start: int, stop: int) -> np.ndarray:
        rows_read[name] += stop - start
        return read_rows(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "read_rows", counting)
    prefix = "model.layers.0."
    down, value, gate = (f"{prefix}{name}.weight" for name in ("mlp.down_proj", "self_attn.v_proj", "mlp.gate_proj"))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: rotated.read_rows(down, start, start + 4), range(0, 64, 4)))
    rotated.read_rows(value, 20, 22)
    rotated.read_rows(gate, 20, 22)
    assert (rows_read[down], rows_read[value], rows_read[gate]) == (64, 16, 2)


def test_reading_less_than_nothing_or_too_much_fails(tiny_checkpoint: Factory) -> None:
    transformed = with_transforms(Checkpoint.open(tiny_checkpoint("gqa")), [RotateHeads()])
    name = "model.layers.0.self_attn.v_proj.weight"
    assert transformed.read_rows(name, 3, 3).shape == (0, 64)
    for start, stop in ((-1, 2), (4, 3), (0, 33)):
        with pytest.raises(ValueError):
            transformed.read_rows(name, start, stop)


def test_no_transforms_are_the_checkpoint_itself(tiny_checkpoint: Factory) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gqa"))
    assert with_transforms(checkpoint, ()) is checkpoint


def test_a_head_is_untied_by_folding_alone(tiny_checkpoint: Factory) -> None:
    tied = Checkpoint.open(tiny_checkpoint("tied"))
    scaled = with_transforms(tied, scales(tied.config))
    assert scaled.config.tie_word_embeddings and "lm_head.weight" not in scaled.tensors
    folded = with_transforms(tied, [FoldNorms()])
    assert folded.config.head_source == "lm_head.weight" and not folded.config.tie_word_embeddings
    assert folded.tensors["model.embed_tokens.weight"] == tied.tensors["model.embed_tokens.weight"]
    assert set(folded.tensors) == set(folded.config.tensor_shapes)


def test_nan_and_overflow_are_refused(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    path = tiny_checkpoint("gqa")
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name = "model.layers.0.mlp.down_proj.weight"
    plant(tmp_path / "model.safetensors", name, -1, 0x7FC0)
    broken = with_transforms(Checkpoint.open(tmp_path), [FoldNorms(), RotateResidual()])
    with pytest.raises(InputError) as found:
        broken.read_rows(name, 0, 1)
    assert found.value.kind == "checkpoint.not_finite" and name in found.value.message
    far = ScaleInput(0, "mlp_hidden", np.full(128, 1e38, np.float32))
    with pytest.raises(InputError) as found:
        with_transforms(with_transforms(Checkpoint.open(path), [far]), [far]).read(name)
    assert found.value.kind == "transform.overflow"


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_no_scales(value: float) -> None:
    scale = np.ones(64, np.float32)
    scale[17] = value
    with pytest.raises(InputError) as found:
        ScaleInput(0, "mlp_input", scale)
    assert found.value.kind == "transform.scale" and "channel 17" in found.value.message


@pytest.mark.parametrize(
    ("kind", "transforms"),
    [
        ("transform.order", (RotateResidual(),)),
        ("transform.order", (FoldNorms(), ScaleInput(0, "mlp_input", np.ones(64)), RotateResidual())),
        ("transform.layer", (ScaleInput(2, "mlp_input", np.ones(64)),)),
        ("transform.shape", (ScaleInput(0, "attention_output", np.ones(64)),)),
        ("transform.shape", (ScaleInput(0, "mlp_hidden", np.ones(64)),)),
    ],
)
def test_transforms_that_do_not_fit(tiny_checkpoint: Factory, kind: str, transforms: tuple[Transform, ...]) -> None:
    with pytest.raises(InputError) as found:
        with_transforms(Checkpoint.open(tiny_checkpoint("gqa")), transforms)
    assert found.value.kind == kind


def test_a_whole_model_saved_and_opened_again(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    """What comes out is a checkpoint like any other: transformers' loader takes it, in float32, from the disk."""
    original = checkpoint_of(tiny_checkpoint, "tied")
    transformed = with_transforms(original, (FoldNorms(), RotateResidual(1), RotateHeads(1)))
    config = AutoConfig.from_pretrained(original.path)
    config.tie_word_embeddings = False
    config.save_pretrained(tmp_path)
    state = {name: torch.from_numpy(transformed.read(name)) for name in transformed.tensors}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    models = [LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (original.path, tmp_path)]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, found = (model(ids).logits for model in models)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert load_file(tmp_path / "model.safetensors").keys() == transformed.tensors.keys()
