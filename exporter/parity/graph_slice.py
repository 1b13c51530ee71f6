"""Slices of the raw or canonical model run on ONNX Runtime with its optimizer off, weights coming and going."""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from exporter.core.canonical import (
    EMBEDDING_INPUTS,
    HEAD_INPUTS,
    LAYER_INPUTS,
    LAYER_OUTPUTS,
    CheckpointWeight,
    RotaryTable,
    ScaleValue,
    Slice,
)
from exporter.core.config import ModelConfig
from exporter.core.scattered_rows import row_ranges, rows_of
from exporter.core.weights import QuantizedRows, row_chunks
from exporter.parity.prologue import split_prologue
from exporter.parity.schedule import GrowingCache, SliceCache, StaticCache, Step
from targets.base import RowReader
from targets.onnxruntime.slice_session import SliceSession

ACTIVATIONS = {*EMBEDDING_INPUTS, *LAYER_INPUTS, *HEAD_INPUTS, "attention_mask"}
Feeds = dict[str, np.ndarray]


class SliceFailed(RuntimeError):
    """ONNX Runtime could not run a slice: its graph is wrong, for instance in a shape."""


class CompiledSlice:
    """A structure ready to run, shared by all layers that share the structure. `body` is what runs each step."""

    def __init__(self, structure: ir.Model) -> None:
        inputs = {value.name or "" for value in structure.graph.inputs}
        split = split_prologue(structure, inputs - ACTIVATIONS)
        self.raw = "attention_mask" in inputs
        self.body = split.body
        self._prologue = SliceSession(split.prologue) if split.prologue else None
        self._body = SliceSession(split.body)

    def prepare(self, weights: Feeds) -> Feeds:
        """Ready weights for `run`: transposed, dequantized, cast."""
        ready = {name: array for name, array in weights.items() if name in self._body.input_names}
        if self._prologue is not None:
            used = {name: array for name, array in weights.items() if name in self._prologue.input_names}
            ready |= _run(self._prologue, used, None)
        return ready

    def run(self, weights: Feeds, activations: Feeds, fetch: list[str] | None = None) -> Feeds:
        return _run(self._body, {**weights, **activations}, fetch)


def _run(session: SliceSession, feeds: Feeds, fetch: list[str] | None) -> Feeds:
    try:
        return session.run(feeds, fetch)
    except Exception as error:
        # Some of its exceptions have no base class of their own, and the runtime is not imported here.
        if isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime"):
            raise SliceFailed(str(error)) from error
        raise


class SliceRunner:
    """Runs slices of one stage; structures are compiled once and kept, weights are not.

    `rows` yields weights at their precision, as the build reads them.
    """

    def __init__(self, config: ModelConfig, rows: RowReader) -> None:
        self._config = config
        self._rows = rows
        # The structure is kept beside what was made of it: an id is unique only while its object lives.
        self._compiled: dict[int, tuple[ir.Model, CompiledSlice]] = {}

    def compiled(self, piece: Slice) -> CompiledSlice:
        key = id(piece.structure)
        if key not in self._compiled:
            self._compiled[key] = (piece.structure, CompiledSlice(piece.structure))
        return self._compiled[key][1]

    def layer(self, piece: Slice, shared: Feeds | None = None) -> "GraphLayer":
        """A layer with its weights; `shared` holds fp32 tensors by checkpoint name that are already in memory."""
        compiled = self.compiled(piece)
        return GraphLayer(compiled, compiled.prepare(self._weights(piece, shared or {})), self._config)

    def embed(self, piece: Slice, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Hidden states [S, H] of rows of ids [S], feeding only the embedding rows that occur."""
        ids = np.unique(np.concatenate(rows))
        weights: Feeds = {}
        for name, weight in piece.weights.items():
            assert isinstance(weight, CheckpointWeight)
            parts = [self._entries(name, weight, *bounds) for bounds in row_ranges(ids)]
            weights |= {key: rows_of(ids, [part[key] for part in parts]) for key in parts[0]}
        compiled = self.compiled(piece)
        ready = compiled.prepare(weights)
        found = [np.searchsorted(ids, row)[None].astype(np.int64) for row in rows]
        return [compiled.run(ready, {"input_ids": row})["hidden"][0] for row in found]

    def logit_columns(self, piece: Slice, hidden: np.ndarray) -> Iterator[np.ndarray]:
        """Logits [R, C] over the vocabulary, in the blocks of `row_chunks`, for hidden [R, H]."""
        for start, stop in row_chunks((self._config.head_size, self._config.hidden_size)):
            logits = self._run_head(piece, hidden, (start, stop))["logits"]
            yield logits.reshape(len(hidden), stop - start)

    def head_value(self, piece: Slice, hidden: np.ndarray, name: str) -> np.ndarray:
        """An inner value of the head that does not depend on the vocabulary, for hidden [R, H]."""
        return self._run_head(piece, hidden, (0, 1), [name])[name]

    def _run_head(
        self, piece: Slice, hidden: np.ndarray, vocabulary: tuple[int, int], fetch: list[str] | None = None
    ) -> Feeds:
        """The head with some rows of the vocabulary."""
        compiled = self.compiled(piece)
        activations = {"hidden": hidden[None]}
        if any(value.name == "rows" for value in piece.structure.graph.inputs):
            activations["rows"] = np.arange(len(hidden), dtype=np.int64)
        weights: Feeds = {}
        for name, weight in piece.weights.items():
            if isinstance(weight, ScaleValue):
                weights[name] = weight.values()
                continue
            assert isinstance(weight, CheckpointWeight)
            bounds = vocabulary if name == "lm_head.weight" else (0, self._config.hidden_size)
            weights |= self._entries(name, weight, *bounds)
        return compiled.run(compiled.prepare(weights), activations, fetch)

    def _weights(self, piece: Slice, shared: Feeds) -> Feeds:
        feeds: Feeds = {}
        for name, weight in piece.weights.items():
            if isinstance(weight, RotaryTable | ScaleValue):
                feeds[name] = weight.values()
            elif weight.precision.kind == "fp32" and all(source in shared for source in weight.sources):
                parts = [shared[source] for source in weight.sources]
                feeds[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
            else:
                feeds |= self._whole(name, weight)
        return feeds

    def _whole(self, name: str, weight: CheckpointWeight) -> Feeds:
        shapes = self._config.tensor_shapes
        rows = sum(shapes[source][0] for source in weight.sources)
        shape = (rows, *shapes[weight.sources[0]][1:])
        parts = [self._entries(name, weight, start, stop) for start, stop in row_chunks(shape)]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _entries(self, name: str, weight: CheckpointWeight, start: int, stop: int) -> Feeds:
        """Graph inputs for rows of a weight: itself, or codes, scales and zero points."""
        rows = self._rows(weight, start, stop)
        if not isinstance(rows, QuantizedRows):
            return {name: rows}
        entries = {f"{name}.codes": rows.codes, f"{name}.scales": rows.scales}
        return entries if rows.zero_points is None else {**entries, f"{name}.zero_points": rows.zero_points}


class GraphLayer:
    """One layer slice with its weights."""

    def __init__(self, compiled: CompiledSlice, weights: Feeds, config: ModelConfig) -> None:
        self.compiled = compiled
        self.weights = weights
        self.config = config

    def cache(self, batch: int, capacity: int) -> SliceCache:
        return GrowingCache(self.config, batch) if self.compiled.raw else StaticCache(self.config, batch, capacity)

    def filled_cache(self, key: np.ndarray, value: np.ndarray, capacity: int) -> SliceCache:
        """A cache of one row that already holds [Hkv, P, D]."""
        return GrowingCache.filled(key, value) if self.compiled.raw else StaticCache.filled(key, value, capacity)

    def step(self, hidden: np.ndarray, step: Step, cache: SliceCache, fetch: list[str] | None = None) -> Feeds:
        """hidden [B, S, H] through the layer; `fetch` names inner values that come with the outputs."""
        names = list(dict.fromkeys([*LAYER_OUTPUTS, *(fetch or [])]))
        outputs = self.compiled.run(self.weights, {"hidden": hidden, **cache.feeds(step)}, names)
        cache.store(outputs, step)
        return outputs

    def run(self, rows: Sequence[np.ndarray], steps: Sequence[Step], cache: SliceCache) -> list[np.ndarray]:
        """All steps of a batch of rows [S_b, H] -> rows of the same shape; positions no step covers are NaN."""
        out = [np.full_like(row, np.nan) for row in rows]
        for step in steps:
            outputs = self.step(step.gather(rows), step, cache)
            step.scatter(outputs["hidden_out"], out)
        return out
