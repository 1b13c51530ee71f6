"""Raising the opset is only a declaration: the operators it admits did not change their meaning."""

import onnx
import pytest

from exporter.core.errors import UnsupportedError
from exporter.trace.opset import OLDEST, UNCHANGED_SINCE_18, convert_opset
from tests.passes.graphs import parse

# Added since opset 18; their defaults keep the old meaning for the types used here (no float8 is ever cast to).
ADDED = {"Cast": {"saturate", "round_mode"}}


@pytest.mark.parametrize("name", sorted(UNCHANGED_SINCE_18))
def test_operators_have_the_same_signature_in_opset_18_and_24(name: str) -> None:
    old, new = (onnx.defs.get_schema(name, version, "") for version in (OLDEST, 24))
    assert [value.name for value in old.inputs] == [value.name for value in new.inputs]
    assert [value.name for value in old.outputs] == [value.name for value in new.outputs]
    assert new.attributes.keys() - old.attributes.keys() == ADDED.get(name, set())
    for attribute in old.attributes:
        assert old.attributes[attribute].default_value == new.attributes[attribute].default_value
    types = {c.type_param_str: set(c.allowed_type_strs) for c in new.type_constraints}
    assert all(set(c.allowed_type_strs) <= types[c.type_param_str] for c in old.type_constraints)


def test_other_operators_are_refused_by_name() -> None:
    model = parse("slice (float[2] x) => (float[2] y) { y = Erf(x) }")
    with pytest.raises(UnsupportedError, match="Erf") as caught:
        convert_opset(model, 24)
    assert caught.value.kind == "trace.opset"


def test_older_opsets_are_refused() -> None:
    model = parse("slice (float[2] x) => (float[2] y) { y = Neg(x) }")
    model.graph.opset_imports[""] = 13
    with pytest.raises(UnsupportedError, match="opset 13"):
        convert_opset(model, 24)
