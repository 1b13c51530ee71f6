"""The calibration of one decoder layer: statistics at its four points, scales, codes, and the next layer's input.

A layer has two halves, attention and MLP, of two points each. Without GPTQ the activations are those of the original
model, so one pass through a half gives the statistics of both its points and the residual stream that leaves it. With
GPTQ every matrix sees what the quantized matrices before it leave (true sequential order, as the reference code of
arXiv:2210.17323 has it): a half takes three passes, and the input of its last matrix is stored between two of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from calibration.accumulate import StatisticsAccumulator
from calibration.activation_store import Activations, ActivationStore, batches
from calibration.coverage import actual_precision
from calibration.decoder import DecoderLayer
from calibration.matrix_algorithms import (
    CodeChooser,
    Heads,
    Wanted,
    input_clip,
    rescaled,
    scales,
    search_scale,
)
from calibration.qparams_writer import QParamsWriter
from calibration.statistics import InputStatistics
from calibration.transforms import CONSUMERS, NORMS, ScaleInput, point_width
from exporter.core.memory import release_free_memory
from exporter.core.recipe import Precision, Recipe

PRODUCERS = {"attention_output": "self_attn.v_proj", "mlp_hidden": "mlp.up_proj"}
"""The matrix whose rows take the division at a point."""
HALVES = (("attention_input", "attention_output"), ("mlp_input", "mlp_hidden"))

Tell = Callable[[str], None]


@dataclass
class LayerRun:
    """What the work on one layer shares. `decoder` holds the weights that the activations flow through: with GPTQ
    they become the rounded ones."""

    index: int
    recipe: Recipe
    decoder: DecoderLayer
    store: ActivationStore
    batch: int
    writer: QParamsWriter
    tell: Tell
    _scales: dict[str, np.ndarray] = field(default_factory=dict)
    _keys: torch.Tensor | None = None
    _values: torch.Tensor | None = None

    def run(self, hidden: Activations) -> Activations:
        """hidden [n, S, H] entering the layer -> what leaves it; everything found is given to the writer."""
        leaving = self.store.make(hidden.shape)
        self._half(0, hidden, leaving)
        self._write_kv_amax()
        self._half(1, leaving, leaving)
        return leaving

    def _half(self, half: int, entering: Activations, leaving: Activations) -> None:
        if "gptq" in self.recipe.algorithms:
            self._half_in_sequence(half, entering, leaving)
        else:
            self._half_at_once(half, entering, leaving)
        release_free_memory()

    @torch.inference_mode()
    def _half_at_once(self, half: int, entering: Activations, leaving: Activations) -> None:
        """The activations of the original model: one pass, then the algorithms."""
        self.tell(HALVES[half][0])
        first, second = (self._accumulator(point, entering) for point in HALVES[half])
        for start, hidden in self._batches(entering):
            x = self._first_input(half, hidden)
            first.add(x)
            y = self._second_input(half, x)
            second.add(y)
            leaving.write(start, self._leave(half, hidden, y).numpy())
        found = [self._scaled(point, part.finish()) for point, part in zip(HALVES[half], (first, second), strict=True)]
        for point, statistics in zip(HALVES[half], found, strict=True):
            self.tell(point)
            self._choose(point, statistics)

    @torch.inference_mode()
    def _half_in_sequence(self, half: int, entering: Activations, leaving: Activations) -> None:
        """What the rounded matrices leave: each matrix is rounded before anything flows through it."""
        first_point, second_point = HALVES[half]
        self.tell(first_point)
        first = self._gather_first(half, entering)
        if scales(self.recipe, self._precision(second_point)):
            self._scaled(second_point, self._fill(half, entering, None))
        self._choose(first_point, self._scaled(first_point, first))
        self._install(first_point)
        del first
        self.tell(second_point)
        n, length, _ = entering.shape
        inner = self.store.make((n, length, point_width(self.decoder.config, second_point)))
        self._choose(second_point, self._fill(half, entering, inner))
        release_free_memory()
        for start, hidden in self._batches(entering):
            y = torch.from_numpy(inner.read(start, start + len(hidden)))
            leaving.write(start, self._leave(half, hidden, y).numpy())
        self.store.drop(inner)

    def _gather_first(self, half: int, entering: Activations) -> InputStatistics:
        gathered = self._accumulator(HALVES[half][0], entering)
        for _, hidden in self._batches(entering):
            gathered.add(self._first_input(half, hidden))
        return gathered.finish()

    def _fill(self, half: int, entering: Activations, inner: Activations | None) -> InputStatistics:
        """Statistics of the second point under the present weights; its values too, where `inner` is given."""
        gathered = self._accumulator(HALVES[half][1], entering)
        self._keys = self._values = None
        for start, hidden in self._batches(entering):
            y = self._second_input(half, self._first_input(half, hidden))
            gathered.add(y)
            if inner is not None:
                inner.write(start, y.numpy())
        return gathered.finish()

    def _batches(self, activations: Activations) -> Iterator[tuple[int, torch.Tensor]]:
        for start, stop in batches(activations.shape[0], self.batch):
            yield start, torch.from_numpy(activations.read(start, stop))

    def _first_input(self, half: int, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder.mlp_input(hidden) if half else self.decoder.attention_input(hidden)

    def _second_input(self, half: int, x: torch.Tensor) -> torch.Tensor:
        if half:
            return self.decoder.mlp_hidden(x)
        attended = self.decoder.attend(x)
        self._keys = _largest(self._keys, attended.keys)
        self._values = _largest(self._values, attended.values)
        return attended.context

    def _leave(self, half: int, hidden: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.decoder.after_mlp(hidden, y) if half else self.decoder.after_attention(hidden, y)

    def _accumulator(self, point: str, activations: Activations) -> StatisticsAccumulator:
        wanted = Wanted.of(self.recipe, self._precision(point))
        n, length, _ = activations.shape
        name = f"layer {self.index}: {point}"
        width = point_width(self.decoder.config, point)
        return StatisticsAccumulator(name, width, n * length, hessian=wanted.hessian, sample=wanted.sample)

    def _precision(self, point: str) -> Precision:
        """What the matrices of a point get; they are packed together, so they agree."""
        asked = self.recipe.layer_precision(self.index, CONSUMERS[point][0])
        return actual_precision(asked, point_width(self.decoder.config, point))

    def _scaled(self, point: str, statistics: InputStatistics) -> InputStatistics:
        """Look for a scale of the point's input, note it, and give the statistics of the scaled input."""
        weights = [self._original(f"{name}.weight") for name in CONSUMERS[point]]
        heads = self._heads if point == "attention_output" else None
        scale, report = search_scale(self.recipe, weights, statistics, self._precision(point), heads)
        if report:
            self.writer.add_report(f"model.layers.{self.index}.{point}", report)
        if scale is None:
            return statistics
        self._scales[point] = scale
        per_row = scale if heads is None else scale.reshape(heads)[:, 0].reshape(-1)
        self.writer.add_transform(ScaleInput(self.index, point, per_row))
        return rescaled(statistics, scale)

    @property
    def _heads(self) -> Heads:
        config = self.decoder.config
        return config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim

    def _original(self, name: str) -> np.ndarray:
        return self.decoder.tensors[name].numpy()

    def _transformed(self, point: str, module: str) -> np.ndarray:
        """A matrix with the scales of its input and of its output worked in; a view where there are none."""
        values = self._original(f"{module}.weight")
        if point in self._scales:
            values = values * self._scales[point]
        if (rows := self._row_scale(module)) is not None:
            values = values / rows[:, None]
        return values

    def _row_scale(self, module: str) -> np.ndarray | None:
        """[N]: what divides the rows of a producer."""
        point = next((point for point, producer in PRODUCERS.items() if producer == module), "")
        if point not in self._scales:
            return None
        scale = self._scales[point]
        return scale.reshape(self._heads)[:, 0].reshape(-1) if point == "attention_output" else scale

    def _shared_amax(self, point: str, precision: Precision) -> float | None:
        """max|w| of the point's matrices where one scale serves them all, as `sharing_scale` says."""
        if precision.kind != "nvfp4":
            return None
        return max(float(np.abs(self._transformed(point, module)).max()) for module in CONSUMERS[point])

    def _choose(self, point: str, statistics: InputStatistics) -> None:
        """Write the input's statistics and the codes of the point's matrices; with GPTQ, exchange the weights."""
        precision = self._precision(point)
        clip = input_clip(self.recipe, precision, statistics)
        self.writer.add_input_amax(self.index, point, statistics.amax, clip)
        chooser = CodeChooser(self.recipe, precision, statistics)
        amax = self._shared_amax(point, precision) if chooser.chooses else None
        for module in CONSUMERS[point]:
            values = self._transformed(point, module)
            name = f"model.layers.{self.index}.{module}"
            if chooser.chooses:
                blocks = list(chooser.blocks(values.shape, rows_of(values), amax))
                self.writer.add_codes(f"{name}.weight", blocks)
                if chooser.report:
                    self.writer.add_report(name, chooser.report)
                if chooser.by_gptq:
                    values = np.concatenate([rows.dequantize() for rows in blocks])
            if "gptq" in self.recipe.algorithms:
                self.decoder.replace(f"{module}.weight", values)

    def _install(self, point: str) -> None:
        """With GPTQ: the rest of what the scales of both points of a half change, in the weights that flow."""
        if point in self._scales:
            name = f"{NORMS[point]}.weight"
            self.decoder.replace(name, self._original(name) / self._scales[point])
        for module in CONSUMERS[point]:
            rows, bias = self._row_scale(module), f"{module}.bias"
            if rows is not None and bias in self.decoder.tensors:
                self.decoder.replace(bias, self._original(bias) / rows)

    def _write_kv_amax(self) -> None:
        assert self._keys is not None and self._values is not None
        values = self._values.numpy()
        if "gptq" not in self.recipe.algorithms and (rows := self._row_scale("self_attn.v_proj")) is not None:
            values = values / rows
        self.writer.add_kv_amax(self.index, self._keys.numpy(), values)


def _largest(so_far: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude a channel: [K] of [n, S, K] and what came before."""
    amax = values.abs().amax((0, 1))
    return amax if so_far is None else torch.maximum(so_far, amax)


def rows_of(values: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """Reads rows [start, stop) of a matrix in memory."""
    return lambda start, stop: values[start:stop]
