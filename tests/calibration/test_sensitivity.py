"""Sensitivities against whole models with one unit rounded, run by transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import LlamaForCausalLM

from calibration.activation_store import ActivationStore
from calibration.divergence import mean_divergences
from calibration.rtn import quantize_rows
from calibration.sensitivity import Unit, measure
from exporter.core.checkpoint import Checkpoint
from exporter.core.errors import InputError
from exporter.core.recipe import Precision
from tests.support.tiny import write_checkpoint

CANDIDATES = (Precision("int4", 64), Precision("int4", 16), Precision("int8", 32))


def measured(path: Path, ids: np.ndarray, work: Path) -> list[Unit]:
    return measure(Checkpoint.open(path), ids, CANDIDATES, ActivationStore(work, 0), lambda fraction, detail: None)


def rounded_model(path: Path, tensors: tuple[str, ...], precision: Precision) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in tensors:
            values = parameters[name].numpy().copy()
            parameters[name].copy_(torch.from_numpy(quantize_rows(values, precision).dequantize()))
    return model


def mean_kl(path: Path, model: LlamaForCausalLM, ids: np.ndarray) -> float:
    """KL over all positions, in float64, from whole logits."""
    reference = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected, found = (
            functional.log_softmax(m(torch.from_numpy(ids)).logits.double(), -1) for m in (reference, model)
        )
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize("shape", ["gqa", "tied", "biases"])
def test_the_cost_of_a_unit_is_the_kl_of_the_model_with_it_rounded(shape: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoint", shape)
    checkpoint = Checkpoint.open(path)
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (3, 12))
    units = {unit.name: unit for unit in measured(path, ids, tmp_path)}
    assert len(units) == 4 * checkpoint.config.num_layers + 2
    for name in ("layers.0.attention_input", "layers.1.mlp_input"):
        model = rounded_model(path, units[name].tensors, CANDIDATES[0])
        assert units[name].divergences[CANDIDATES[0]] == pytest.approx(mean_kl(path, model, ids), rel=1e-2)
    if not checkpoint.config.tie_word_embeddings:
        model = rounded_model(path, ("lm_head.weight",), CANDIDATES[1])
        assert units["head"].divergences[CANDIDATES[1]] == pytest.approx(mean_kl(path, model, ids), rel=1e-2)


def test_other_precisions_follow_from_the_output_error(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoint", "gqa")
    ids = np.random.default_rng(0).integers(0, Checkpoint.open(path).config.vocab_size, (3, 12))
    for unit in measured(path, ids, tmp_path)[1:-1]:
        measured_kl = mean_kl(path, rounded_model(path, unit.tensors, CANDIDATES[1]), ids)
        assert 0.5 < unit.divergences[CANDIDATES[1]] / measured_kl < 2, unit.name


def test_more_bits_cost_less(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoint", "gqa")
    ids = np.random.default_rng(1).integers(0, Checkpoint.open(path).config.vocab_size, (2, 10))
    for unit in measured(path, ids, tmp_path):
        coarse, fine, eight = (unit.divergences[precision] for precision in CANDIDATES)
        assert coarse > fine > 20 * eight > 0, unit.name


def test_divergences_are_those_of_whole_logits() -> None:
    rng = torch.Generator().manual_seed(0)
    head, base = torch.randn(50, 8, generator=rng), torch.randn(6, 8, generator=rng)
    other, changed = base + 0.1 * torch.randn(6, 8, generator=rng), head * 1.05

    def blocks():  # type: ignore[no-untyped-def]
        return ((i, i + 20, head[i : i + 20]) for i in range(0, 50, 20))

    found = mean_divergences(base, {"other": other}, {"head": lambda rows, name: rows * 1.05}, blocks)
    for name, (x, weight) in {"other": (other, head), "head": (base, changed)}.items():
        expected, logits = ((a @ b.T).double() for a, b in ((base, head), (x, weight)))
        kl = functional.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean")
        # Log-sum-exps near 5 are rounded to float32: 2.4e-7 each.
        assert found[name] == pytest.approx(float(kl), abs=1e-6)


@pytest.mark.parametrize(
    ("names", "factor", "words"),
    [
        (["down"], 1e30, r"rounding layers\.0\.mlp_hidden changes the model by NaN or Inf"),
        (["gate", "up"], 1e25, "layer 0: mlp_hidden holds NaN or Inf"),
    ],
)
def test_a_layer_that_overflows_is_named(tmp_path: Path, names: list[str], factor: float, words: str) -> None:
    path = write_checkpoint(tmp_path / "m", "gqa")
    tensors = load_file(path / "model.safetensors")
    for name in names:
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] *= factor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=words):
        measured(path, np.arange(32).reshape(2, 16), tmp_path)


def test_a_scale_takes_loud_channels_out_of_the_cost(tmp_path: Path) -> None:
    """Columns of q, k, v divided by 64 where the norm's gamma is multiplied by it: the same function. Rounded plainly
    it costs far more; under a scale about as much as the model without such channels."""
    path = write_checkpoint(tmp_path / "checkpoint", "gqa", dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, Checkpoint.open(path).config.vocab_size, (3, 12))
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.input_layernorm.weight[:3] *= 64
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight[:, :3] /= 64
    loud = tmp_path / "loud"
    model.save_pretrained(loud)
    costs = {
        (where, scaled): next(
            unit.divergences[CANDIDATES[1]]
            for unit in measure(
                Checkpoint.open(where), ids, CANDIDATES, ActivationStore(tmp_path, 0), lambda *step: None, scaled=scaled
            )
            if unit.name == "layers.0.attention_input"
        )
        for where in (path, loud)
        for scaled in (False, True)
    }
    assert costs[loud, False] > 5 * costs[path, False]
    assert costs[loud, True] < 2 * costs[path, False]
    assert costs[path, True] <= costs[path, False] * 1.3
