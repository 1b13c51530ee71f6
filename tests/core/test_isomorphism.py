"""Structural equality of graphs: names and order do not matter, everything else does."""

import pytest

from exporter.core.isomorphism import difference
from tests.passes.graphs import parse

GRAPH = (
    "slice (float[B,4] x, float[4] w) => (float[B,4] y) <float c = {2.0}> { a = Mul(x, c) b = Sub(a, w) y = Neg(b) }"
)


def test_names_order_and_shared_constants_do_not_matter() -> None:
    renamed = GRAPH.replace("a = ", "first = ").replace("(a, ", "(first, ")
    assert difference(parse(GRAPH), parse(renamed)) is None
    shared = "slice (float[4] x) => (float[4] y) <float c = {2.0}> { a = Mul(x, c) y = Add(a, c) }"
    apart = shared.replace("<float c = {2.0}>", "<float c = {2.0}, float d = {2.0}>").replace("(a, c)", "(a, d)")
    assert difference(parse(shared), parse(apart)) is None


def test_a_default_attribute_may_be_left_out() -> None:
    text = "slice (float[2,3] x) => (float[3,2] y) <int64[2] s = {{3, 2}}> {{ y = Reshape {} (x, s) }}"
    assert difference(parse(text.format("<allowzero = 0>")), parse(text.format(""))) is None
    assert difference(parse(text.format("<allowzero = 1>")), parse(text.format(""))) is not None


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Neg(b)", "Abs(b)", "Neg against Abs"),
        ("{2.0}", "{3.0}", "constants"),
        ("Sub(a, w)", "Sub(w, a)", "wiring"),
        ("Sub(a, w)", "Sub(x, w)", "wiring"),
        ("float[B,4] x", "float[B,5] x", "inputs differ"),
        ("float[4] w", "float[4] v, float[4] w", "inputs differ"),
        ("y = Neg(b)", "y = Neg(b) z = Neg(a)", "operators differ"),
    ],
)
def test_differences_are_found_and_named(old: str, new: str, reason: str) -> None:
    assert reason in str(difference(parse(GRAPH), parse(GRAPH.replace(old, new))))


def test_two_values_are_not_one() -> None:
    once = "slice (float[4] x) => (float[4] y) { a = Neg(x) y = Mul(a, a) }"
    twice = "slice (float[4] x) => (float[4] y) { a = Neg(x) b = Neg(x) y = Mul(a, b) }"
    assert difference(parse(once), parse(twice)) is not None
    assert difference(parse(twice), parse(once)) is not None
