"""A graph that TensorRT's parser refuses, as an error that names the nodes and why."""

import re
from collections.abc import Iterator
from typing import Any

from exporter.core.errors import UnsupportedError
from targets.tensorrt.build_log import clean
from targets.tensorrt.toolkit import Toolkit

MOST_NODES = 5
ASSERTION = re.compile(r"^Assertion failed: .+?: (.+)$", re.DOTALL)
NO_SUCH = "UNSUPPORTED_NODE"


def parser_error(toolkit: Toolkit, parser: Any) -> UnsupportedError:
    """The error of a parser whose `parse` failed: its first nodes with the reason of each."""
    found = list(dict.fromkeys(_described(parser)))
    shown = "; ".join(found[:MOST_NODES]) or "it gives no reason"
    more = f"; and {len(found) - MOST_NODES} more" if len(found) > MOST_NODES else ""
    remedy = "choose another recipe or target: the graph holds what this TensorRT cannot take"
    return UnsupportedError("tensorrt.parser", f"{toolkit.label} refuses the graph: {shown}{more}", remedy)


def _described(parser: Any) -> Iterator[str]:
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        operator = error.node_operator()
        name = error.node_name() or f"number {error.node()}"
        reason = reason_of(error.code().name, error.desc(), operator)
        yield f"node {name} ({operator}): {reason}" if operator else reason


def reason_of(code: str, description: str, operator: str) -> str:
    """`Assertion failed: CONDITION: REASON` -> the reason; a condition alone says nothing to a reader."""
    if code == NO_SUCH or (found := re.match(r"Plugin not found", description)):
        return f"it has no operator {operator}"
    found = ASSERTION.match(description)
    return clean(found.group(1) if found else description)
