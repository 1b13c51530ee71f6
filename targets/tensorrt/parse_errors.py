"""A graph that TensorRT's parser refuses, as an error that names the nodes and why."""

import re
from collections.abc import Iterator
from typing import Any

from exporter.core.errors import UnsupportedError
from targets.tensorrt.build_log import BuildLog, clean
from targets.tensorrt.toolkit import Toolkit

MOST_NODES = 5
ASSERTION = re.compile(r"^Assertion failed: .+?: (.+)$", re.DOTALL)
# The other form of the parser's checks: a condition of its source and what it means.
QUOTED = re.compile(r'&& "([^"]+)"$')
ADVICE = re.compile(r"\s*Please set k[A-Z_0-9]+ .*$", re.DOTALL)
NO_SUCH = ("false", "Plugin not found")


def parser_error(toolkit: Toolkit, parser: Any, log: BuildLog) -> UnsupportedError:
    """The error of a parser whose `parse` failed: its first nodes with the reason of each."""
    found = list(dict.fromkeys(_described(parser, log)))
    shown = "; ".join(found[:MOST_NODES]) or "it gives no reason"
    more = f"; and {len(found) - MOST_NODES} more" if len(found) > MOST_NODES else ""
    remedy = "choose another recipe or target: the graph holds what this TensorRT cannot take"
    return UnsupportedError("tensorrt.parser", f"{toolkit.label} refuses the graph: {shown}{more}", remedy)


def _described(parser: Any, log: BuildLog) -> Iterator[str]:
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        operator, reason = error.node_operator(), reason_of(error.desc(), error.node_operator())
        if operator:
            yield f"node {error.node_name() or f'number {error.node()}'} ({operator}): {reason}"
        else:
            # Not a node but a file or a weight: the cause stands in the log before it.
            yield "; ".join([*log.errors[:1], reason])


def reason_of(description: str, operator: str) -> str:
    """The words in a failed check of the parser; a condition alone says nothing to a reader."""
    if operator and description.startswith("false"):
        return f"it has no operator {operator}"
    found = ASSERTION.match(description) or QUOTED.search(description)
    reason = ADVICE.sub("", clean(found.group(1) if found else description))
    return f"it has no operator {operator}" if operator and reason.startswith(NO_SUCH) else reason
