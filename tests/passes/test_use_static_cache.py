"""The static cache: the same attention through another interface, for ragged rows and for pasts of any length."""

import numpy as np
import onnx_ir as ir
import pytest

from exporter.passes.use_static_cache import use_static_cache
from tests.passes.graphs import assert_same, context, normal, operators, parse, piece, run_ort, run_reference

B, H, KV, S, D, M = 2, 4, 2, 3, 8, 12
GRAPH = """
slice (float[B,{h},S,{d}] q, float[B,{kv},S,{d}] k, float[B,{kv},S,{d}] v, float[B,1,S,T] attention_mask,
       float[B,{kv},P,{d}] past_key, float[B,{kv},P,{d}] past_value)
  => (float[B,{h},S,{d}] y, float[B,{kv},T,{d}] present_key, float[B,{kv},T,{d}] present_value)
{{
  present_key = Concat <axis = {axis}> ({keys})
  present_value = Concat <axis = -2> (past_value, v)
  y = Attention <scale = 0.35{causal}> (q, present_key, present_value, {mask})
  {extra}
}}
"""
DEFAULTS = {"axis": "-2", "keys": "past_key, k", "causal": "", "mask": "attention_mask", "extra": ""}


def growing(**changes: str) -> ir.Model:
    return parse(GRAPH.format(h=H, kv=KV, d=D, **{**DEFAULTS, **changes}))


def dynamic_feeds(past: int) -> dict[str, np.ndarray]:
    seen = np.arange(past + S) <= np.arange(S)[:, None] + past
    mask = np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)
    return {
        "q": normal(0, B, H, S, D),
        "k": normal(1, B, KV, S, D),
        "v": normal(2, B, KV, S, D),
        "past_key": normal(3, B, KV, past, D),
        "past_value": normal(4, B, KV, past, D),
        "attention_mask": np.broadcast_to(mask, (B, 1, S, past + S)).copy(),
    }


def static_feeds(dynamic: dict[str, np.ndarray], past: int) -> dict[str, np.ndarray]:
    feeds = {name: dynamic[name] for name in "qkv"}
    for name in ("past_key", "past_value"):
        # What lies beyond the past must not matter: fill it with large numbers.
        buffer = np.full((B, KV, M, D), 1e4, np.float32)
        buffer[:, :, :past] = dynamic[name]
        feeds[name] = buffer
    return {**feeds, "write_indices": np.full(B, past), "nonpad_kv_seqlen": np.full(B, past + S)}


@pytest.mark.parametrize("past", [0, 1, 5, M - S])
def test_attends_the_same_through_the_static_cache(past: int) -> None:
    model = growing()
    dynamic = dynamic_feeds(past)
    expected = run_ort(model, dynamic)
    assert use_static_cache(piece(model), context()).fired == 1
    assert operators(model) == {"TensorScatter": 2, "ReduceMax": 1, "Slice": 2, "Attention": 1}
    assert "attention_mask" not in [value.name for value in model.graph.inputs]
    assert [value.name for value in model.graph.outputs] == ["y", "present_key", "present_value"]
    for run in (run_ort, run_reference):
        found = run(model, static_feeds(dynamic, past))
        live = {name: array[:, :, : past + S] if name != "y" else array for name, array in found.items()}
        assert_same(live, expected)


def test_rows_of_different_lengths_attend_each_to_their_own_past() -> None:
    pasts = [1, 6]
    model = growing()
    alone = [run_ort(model, dynamic_feeds(past)) for past in pasts]
    use_static_cache(piece(model), context())
    rows = [static_feeds(dynamic_feeds(past), past) for past in pasts]
    mixed = {name: np.stack([rows[i][name][i] for i in range(B)]) for name in rows[0]}
    found = run_ort(model, mixed)
    for i, past in enumerate(pasts):
        assert_same({"y": found["y"][i]}, {"y": alone[i]["y"][i]})
        written = {name: found[name][i, :, : past + S] for name in ("present_key", "present_value")}
        assert_same(written, {name: alone[i][name][i] for name in written})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"axis": "-1"}, "along axis -1"),
        ({"keys": "k, past_key"}, "not joined to past_key"),
        ({"keys": "past_value, k"}, "not joined to past_key"),
        ({"causal": ", is_causal = 1"}, "causal already"),
        ({"extra": "mask_again = Neg(attention_mask)"}, "by it alone"),
    ],
    ids=["joined along the width", "new before past", "another past", "causal with a mask", "mask used elsewhere"],
)
def test_leaves_a_near_miss_untouched(changes: dict[str, str], reason: str) -> None:
    model = growing(**changes)
    before, inputs = operators(model), [value.name for value in model.graph.inputs]
    outcome = use_static_cache(piece(model), context())
    assert outcome.fired == 0
    assert operators(model) == before
    assert [value.name for value in model.graph.inputs] == inputs
    assert reason in outcome.why_not


def test_leaves_a_join_that_is_no_output() -> None:
    model = growing()
    model.graph.outputs.pop(1)
    assert "not present_key" in use_static_cache(piece(model), context()).why_not
