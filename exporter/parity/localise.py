"""Which operator of a failing layer diverges first: inner values compared with the stage before, or with eager.

Fusing keeps the names of the values that it replaces, so equal names mean equal values. What lies between the last
equal value and the first different one is under suspicion.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporter.core.canonical import Slice
from exporter.parity.anchors import anchored_values
from exporter.parity.graph_slice import Feeds, GraphLayer, SliceFailed
from exporter.parity.limits import within
from exporter.parity.metrics import relative_l2_error
from exporter.parity.reference import EagerLayer
from exporter.parity.report import Divergence
from exporter.parity.schedule import SliceCache, Step, main_steps
from targets.onnxruntime.slice_session import SliceSession

LAYOUT = {"Reshape", "Transpose", "Split", "Cast", "Identity", "Squeeze", "Unsqueeze", "Expand", "Concat", "Slice"}


@dataclass(frozen=True)
class Suspect:
    """A layer that failed, and what it should have equalled: `before` is the same layer in the stage before. `limit`:
    how far, relative L2, equal values may lie apart."""

    piece: Slice
    layer: GraphLayer
    before: GraphLayer | None
    eager: EagerLayer
    limit: float


@dataclass(frozen=True)
class Evidence:
    """Inputs to try it on: one row [S, H] with its prompt length; the long row, its cached keys and values
    [Hkv, P, D], whose rest is the tail."""

    row: np.ndarray
    prompt: int
    long_row: np.ndarray
    past: tuple[np.ndarray, np.ndarray]


def localise(found: Divergence, suspect: Suspect, evidence: Evidence) -> Divergence:
    """The same divergence with operator, value and suspects filled in as far as they can be told."""
    for trial in (_at_once, _through_cache, _at_the_end):
        if (refined := trial(found, suspect, evidence)) is not None:
            return refined
    return found


def _at_once(found: Divergence, suspect: Suspect, evidence: Evidence) -> Divergence | None:
    """A whole row in one step from an empty cache, against eager modules and the stage before."""
    length = len(evidence.row)
    step = Step.single(0, length)
    expected = anchored_values(suspect.piece, suspect.eager.probe(evidence.row))
    expected = {name: array for name, array in expected.items() if name in _producers(suspect.layer)}
    if suspect.before is not None:
        cache = suspect.before.cache(1, length)
        expected |= _common(suspect.before, suspect.layer, evidence.row, step, cache)
    else:
        output = suspect.eager.run(evidence.row)
        expected |= {"hidden_out": output.hidden[None], "present_key": output.keys[None]}
        expected["present_value"] = output.values[None]
    return _compare(found, suspect, evidence.row, step, suspect.layer.cache(1, length), expected)


def _through_cache(found: Divergence, suspect: Suspect, evidence: Evidence) -> Divergence | None:
    """The row again in chunks and single steps: faults in how the cache is written, or seen at an offset."""
    if suspect.before is None:
        return None
    length = len(evidence.row)
    caches = [layer.cache(1, length) for layer in (suspect.before, suspect.layer)]
    for step in main_steps(evidence.prompt, length - evidence.prompt, 2, length):
        expected = _common(suspect.before, suspect.layer, evidence.row, step, caches[0])
        if refined := _compare(found, suspect, evidence.row, step, caches[1], expected):
            return refined
    return None


def _at_the_end(found: Divergence, suspect: Suspect, evidence: Evidence) -> Divergence | None:
    """The last positions of the longest row: faults of position tables."""
    if suspect.before is None:
        return None
    length, start = len(evidence.long_row), evidence.past[0].shape[1]
    step = Step.single(start, length - start)
    caches = [layer.filled_cache(*evidence.past, length) for layer in (suspect.before, suspect.layer)]
    expected = _common(suspect.before, suspect.layer, evidence.long_row, step, caches[0])
    return _compare(found, suspect, evidence.long_row, step, caches[1], expected)


def _common(before: GraphLayer, layer: GraphLayer, row: np.ndarray, step: Step, cache: SliceCache) -> Feeds:
    """Every float value of the stage before that the failing layer knows by the same name."""
    names = [name for name in _producers(layer) if name in _producers(before)]
    values = before.step(step.gather([row]), step, cache, names)
    return {name: array for name, array in values.items() if array.dtype == np.float32}


def _compare(
    found: Divergence, suspect: Suspect, row: np.ndarray, step: Step, cache: SliceCache, expected: Feeds
) -> Divergence | None:
    """The first of the expected values, in the order of computation, that the layer computes differently."""
    layer, limit = suspect.layer, suspect.limit
    feeds = {**layer.weights, "hidden": step.gather([row]), **cache.feeds(step)}
    order = [name for name in _producers(layer) if name in expected]
    try:
        values: Mapping[str, np.ndarray] = layer.step(step.gather([row]), step, cache, order)
        fetch: Callable[[str], np.ndarray] = values.__getitem__
    except SliceFailed:
        fetch = _PartialRun(layer.compiled.body, feeds)
    equal: set[str] = set()
    errors = {name: _aligned_error(expected[name], fetch, name) for name in order}
    for name, error in errors.items():
        if within(error, limit):
            equal.add(name)
            continue
        path = _suspects(layer, name, equal)
        operator = _operator(path, errors, limit)
        return replace(found, operator=operator.op_type, value=name, suspects=tuple(n.op_type for n in path))
    return None


@dataclass(frozen=True)
class _PartialRun:
    """One value of a graph that cannot be run as a whole: only what leads to the value is run."""

    body: ir.Model
    feeds: Feeds

    def __call__(self, name: str) -> np.ndarray:
        model = self.body.clone()
        value = next(v for node in model.graph for v in node.outputs if v.name == name)
        if value.type is None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        del model.graph.outputs[:]
        model.graph.outputs.append(value)
        RemoveUnusedNodesPass()(model)
        return SliceSession(model).run(self.feeds)[name]


def _aligned_error(expected: np.ndarray, fetch: Callable[[str], np.ndarray], name: str) -> float:
    """Relative L2, over the shorter extent where a static cache is longer than what it holds; infinite if the value
    cannot be computed or has another shape."""
    try:
        value = fetch(name)
    except Exception:  # whatever the runtime raises: the value does not come
        return np.inf
    if value.ndim != expected.ndim:
        return np.inf
    if name.startswith("present") and value.ndim == 4:
        length = min(value.shape[2], expected.shape[2])
        value, expected = value[:, :, :length], expected[:, :, :length]
    return relative_l2_error(expected, value) if value.shape == expected.shape else np.inf


def _suspects(layer: GraphLayer, name: str, equal: set[str]) -> list[ir.Node]:
    """Nodes that lead to a value from values known to be equal, the last one first."""
    producers = _producers(layer)
    seen: list[ir.Node] = []
    pending = [producers[name]]
    while pending:
        node = pending.pop(0)
        if node in seen:
            continue
        seen.append(node)
        pending.extend(_upstream(node, producers, equal))
    return seen


def _upstream(node: ir.Node, producers: Mapping[str, ir.Node], equal: set[str]) -> Iterator[ir.Node]:
    for value in node.inputs:
        name = value.name if value is not None else None
        if name is not None and name in producers and name not in equal:
            yield producers[name]


def _operator(path: list[ir.Node], errors: Mapping[str, float], limit: float) -> ir.Node:
    """The last suspect, or what stands before it if it only moves data.

    A Split is to blame itself when it yields other shapes than expected, or when a sibling output is right.
    """
    first = path[0]
    outputs = [errors[value.name] for value in first.outputs if value.name is not None and value.name in errors]
    if first.op_type == "Split" and (np.isinf(max(outputs)) or within(min(outputs), limit)):
        return first
    return next((node for node in path if node.op_type not in LAYOUT), first)


def _producers(layer: GraphLayer) -> dict[str, ir.Node]:
    """Producing nodes by value name, in the order of computation."""
    return {value.name: node for node in layer.compiled.body.graph for value in node.outputs if value.name}
