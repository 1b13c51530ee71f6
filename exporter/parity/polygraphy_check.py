"""An engine's ONNX graph beside its simulation, by Polygraphy: its ONNX Runtime runner, its comparator, our model.

Where the stand-in is driven by our runner, this goes around it: a few whole calls of the graph, the caches given and
taken by hand. So a mistake that runner and graph share is seen here.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.parity.inputs import ParityInputs
from exporter.parity.limits import within
from exporter.parity.metrics import relative_l2_error
from exporter.parity.polygraphy_feeds import Case, polygraphy_cases
from exporter.parity.reference import EagerModel
from exporter.parity.report import Check
from targets.tensorrt.cpu_form import cpu_form
from targets.tensorrt.cpu_session import open_graph
from targets.tensorrt.engine_index import EngineIndex

NAME = "polygraphy_relative_l2_error"
STAGE = "compile"


def polygraphy_checks(
    model: Path, simulation: EagerModel, inputs: ParityInputs, index: EngineIndex, limit: float | None, threads: int = 0
) -> tuple[Check, ...]:
    """Relative L2 of the graph's logits, and of the last layer's cache, to the simulation's: the largest over a prompt
    of one row, a decoding step after it, and a ragged batch. `limit` None: reported, not gated, for recipes that round
    activations part by whole steps over a model's depth. Not run, with a note, where Polygraphy is missing."""
    try:
        import polygraphy
    except ImportError:
        return (Check(NAME, None, None, STAGE, "not run: pip install polygraphy"),)
    cases = polygraphy_cases(simulation, inputs, index)
    with _quiet():
        errors = _compare(model, cases, limit, threads)
    note = "; ".join([f"Polygraphy {polygraphy.__version__}, {len(cases)} calls of {model.name}", *errors.changes])
    return tuple(
        Check(NAME if name == "logits" else f"{NAME}_{name}", value, limit, STAGE, note)
        for name, value in errors.largest.items()
    )


@dataclass
class Errors:
    """The largest relative L2 error of each output: a comparison function of Polygraphy's that keeps what it saw.
    `changes`: what of the graph was computed otherwise than it stands."""

    largest: dict[str, float]
    limit: float | None
    changes: tuple[str, ...] = ()

    def __call__(self, expected: Any, found: Any) -> "OrderedDict[str, bool]":
        passed: OrderedDict[str, bool] = OrderedDict()
        for name, values in expected.items():
            defined = ~np.isnan(values)
            error = relative_l2_error(values[defined], np.asarray(found[name], np.float32)[defined])
            group = "logits" if name == "logits" else "cache"
            self.largest[group] = max(self.largest.get(group, 0.0), error)
            passed[name] = within(error, self.limit)
        return passed


def _compare(model: Path, cases: list[Case], limit: float | None, threads: int) -> Errors:
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.comparator import Comparator

    outputs = list(cases[0].expected)
    session, changes = _session(model, outputs, threads)
    types = {value.name: value.type for value in session.get_inputs()}
    feeds = [_as_the_graph_takes(case.feeds, types) for case in cases]
    errors = Errors({}, limit, changes)
    runners = [_simulation_runner(cases, feeds), OnnxrtRunner(session)]
    results = Comparator.run(runners, data_loader=feeds)
    passed = bool(Comparator.compare_accuracy(results, compare_func=errors))
    if passed != all(within(error, limit) for error in errors.largest.values()):
        raise RuntimeError("Polygraphy's verdict differs from the errors that it was given")
    return errors


def _session(model: Path, outputs: list[str], threads: int) -> tuple[Any, tuple[str, ...]]:
    """The graph as the CPU computes it, and what that changes of it; with some of its outputs: copies of all caches
    would fill the memory."""
    import onnx

    proto = onnx.load(str(model), load_external_data=False)
    kept = [value for value in proto.graph.output if value.name in outputs]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)
    changes = cpu_form(proto)
    return open_graph(proto, model.parent, threads), changes


def _as_the_graph_takes(feeds: dict[str, np.ndarray], types: dict[str, str]) -> dict[str, np.ndarray]:
    """Caches in the graph's type; they hold values of it already."""
    kinds = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}
    return {name: array.astype(kinds[types[name]]) for name, array in feeds.items()}


def _simulation_runner(cases: list[Case], feeds: list[dict[str, np.ndarray]]) -> Any:
    """Our model as a runner of Polygraphy's. What it says of each case was computed in one walk over its layers, so
    that each layer's weights are read once."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class SimulationRunner(BaseRunner):
        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for name, array in feeds[0].items():
                metadata.add(name, array.dtype, (-1,) * array.ndim)
            return metadata

        def infer_impl(self, feed_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            self.inference_time = 0.0
            return next(case.expected for case in cases if case.is_fed(feed_dict))

    return SimulationRunner(name="simulation", prefix="simulation")


@contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy writes to the standard output, which is the command line's."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        yield
