"""How much each unit of a model costs when it is rounded: the measurements behind the recipe `auto`.

A unit is what shares a precision in every target: the matrices that read one point of a layer (q, k and v; gate and
up), the head, the embedding. Each is rounded to nearest alone, at REFERENCE, and the model with it runs on a few
sequences of the calibration text: its mean KL against the model itself is the unit's cost. Costs at other precisions
follow from it in proportion to the squared error of the unit's own output, which KL is quadratic in. The head's are all
measured.

All variants pass through a layer together, so that every weight is read once; their hidden states wait in the store.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from calibration.activation_store import Activations, ActivationStore, batches
from calibration.decoder import DecoderLayer, rms_norm
from calibration.divergence import mean_divergences
from calibration.rtn import magnitude, quantize_rows, wants_tensor_amax
from calibration.transforms import CONSUMERS
from exporter.core.checkpoint import EMBEDDING, HEAD, Checkpoint
from exporter.core.errors import InputError
from exporter.core.recipe import Precision
from exporter.core.scattered_rows import row_ranges, rows_of
from exporter.core.weights import read_layer, read_tensor_rows, row_chunks

REFERENCE = Precision("int4", 128)
SCORED = 512
BATCH = 4
EXPONENTS = (0.25, 0.5, 0.75)
"""Of the mean magnitude of an input, for its scale: steps of AWQ's grid that show whether it has loud channels."""
Advance = Callable[[float, str], None]


@dataclass(frozen=True)
class Unit:
    """What shares a precision: checkpoint tensors [N, K], and the mean KL at each candidate precision."""

    name: str
    tensors: tuple[str, ...]
    divergences: dict[Precision, float] = field(default_factory=dict)


def measure(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    candidates: Sequence[Precision],
    store: ActivationStore,
    advance: Advance,
    *,
    scaled: bool = False,
) -> list[Unit]:
    """The cost of every unit of the model at every candidate, over sequences of ids [n, S].

    Units: `embedding`, `layers.3.attention_input` ... (points of calibration.transforms), `head`. Candidates that
    do not divide a unit's width are left out there. InputError (`calibrate.not_finite`) names a unit without a cost.
    `advance(fraction, detail)` reports progress. `scaled`: matrices of layers are rounded under a scale of their input,
    as AWQ will round them: the best of EXPONENTS.
    """
    with torch.inference_mode():
        units = _Measurement(checkpoint, ids, list(candidates), store, advance, scaled).run()
    for unit in units:
        if not all(map(math.isfinite, unit.divergences.values())):
            raise _not_finite(f"rounding {unit.name} changes the model by NaN or Inf, which measures nothing")
    return units


def _not_finite(what: str) -> InputError:
    remedy = "the model overflows in float32 on this text: check the checkpoint, this layer and those before it"
    return InputError("calibrate.not_finite", what, remedy)


class _Measurement:
    """The walk of the model and its variants through embedding, layers and head."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: np.ndarray,
        candidates: list[Precision],
        store: ActivationStore,
        advance: Advance,
        scaled: bool,
    ) -> None:
        self.scaled = scaled
        self.checkpoint, self.config, self.ids = checkpoint, checkpoint.config, ids
        self.candidates, self.store, self.advance = candidates, store, advance
        self.shape = (*ids.shape, self.config.hidden_size)
        self.units: list[Unit] = []
        self.errors: dict[str, dict[Precision, float]] = {}
        self.variants: dict[str, Activations] = {}
        self.base = store.make(self.shape)

    def run(self) -> list[Unit]:
        layers = self.config.num_layers
        self._embed()
        for index in range(layers):
            self.advance(index / (layers + 1), f"sensitivity, layer {index} of {layers}")
            self._layer(index)
        self.advance(layers / (layers + 1), "sensitivity, head")
        self._head()
        self.store.drop(self.base)
        for variant in self.variants.values():
            self.store.drop(variant)
        return self.units

    def _fitting(self, width: int) -> list[Precision]:
        return [precision for precision in self.candidates if precision.divides(width)]

    def _reference(self, width: int) -> Precision:
        """REFERENCE, or what divides the width."""
        return next(p for p in (REFERENCE, *(Precision("int4", g) for g in (64, 32, 16, -1))) if p.divides(width))

    def _embed(self) -> None:
        """The base's states, and those with a rounded embedding."""
        used, places = np.unique(self.ids, return_inverse=True)
        table = rows_of(used, (self._rows(EMBEDDING, *bounds) for bounds in row_ranges(used)))
        reference = self._reference(table.shape[1])
        amax = self._tensor_amax(EMBEDDING, [*self.candidates, reference])

        def error(precision: Precision) -> float:
            return float(np.square(_rounded(table, precision, amax) - table, dtype=np.float64).sum())

        self._add("embedding", (EMBEDDING,), {p: error(p) for p in {*self._fitting(table.shape[1]), reference}})
        variant = self.store.make(self.shape)
        rounded = _rounded(table, reference, amax)
        places = places.reshape(self.ids.shape)
        for start, stop in batches(len(self.ids), BATCH):
            self.base.write(start, table[places[start:stop]])
            variant.write(start, rounded[places[start:stop]])
        self.variants["embedding"] = variant

    def _layer(self, index: int) -> None:
        tensors = read_layer(self.checkpoint, index)
        layer = DecoderLayer(self.config, tensors, self.shape[1])
        for variant in self.variants.values():
            self._advance(layer, variant, variant)
        for point, names in CONSUMERS.items():
            self._round_point(layer, tensors, index, point, names)
        self._advance(layer, self.base, self.base)

    def _round_point(
        self, layer: DecoderLayer, tensors: dict[str, np.ndarray], index: int, point: str, names: tuple[str, ...]
    ) -> None:
        """A new variant with the matrices that read one point rounded, and their output errors at each candidate."""
        weights = {f"{name}.weight": tensors[f"{name}.weight"] for name in names}
        width = next(iter(weights.values())).shape[1]
        reference, errors = self._reference(width), dict[Precision, float]()
        inputs = self._gathered(layer, index, point, width)
        scale = _best_scale(inputs, weights, reference) if self.scaled else None
        for precision in {*self._fitting(width), reference}:
            rounded = {name: _rounded_under(values, precision, scale) for name, values in weights.items()}
            errors[precision] = _output_error(inputs, weights, rounded)
            if precision == reference:
                self._add_variant(layer, f"layers.{index}.{point}", weights, rounded)
        self.store.drop(inputs)
        self._add(f"layers.{index}.{point}", tuple(f"model.layers.{index}.{name}" for name in weights), errors)

    def _gathered(self, layer: DecoderLayer, index: int, point: str, width: int) -> Activations:
        """The base's value at a point of the layer: computed once, read for every way to round."""
        inputs = self.store.make((*self.shape[:2], width))
        for (start, _), x in zip(batches(self.shape[0], BATCH), self._inputs(layer, index, point), strict=True):
            inputs.write(start, x.numpy())
        return inputs

    def _add_variant(
        self, layer: DecoderLayer, name: str, weights: dict[str, np.ndarray], rounded: dict[str, np.ndarray]
    ) -> None:
        for tensor, values in rounded.items():
            layer.replace(tensor, values)
        self.variants[name] = self.store.make(self.shape)
        self._advance(layer, self.base, self.variants[name])
        for tensor, values in weights.items():
            layer.replace(tensor, values)

    def _advance(self, layer: DecoderLayer, source: Activations, out: Activations) -> None:
        for start, stop in batches(self.shape[0], BATCH):
            hidden = torch.from_numpy(source.read(start, stop))
            hidden = layer.after_attention(hidden, layer.attend(layer.attention_input(hidden)).context)
            hidden = layer.after_mlp(hidden, layer.mlp_hidden(layer.mlp_input(hidden)))
            out.write(start, hidden.numpy())

    def _inputs(self, layer: DecoderLayer, index: int, point: str) -> Iterator[torch.Tensor]:
        """The base's value at a point of the layer, batch by batch. InputError where it is not finite."""
        for start, stop in batches(self.shape[0], BATCH):
            hidden = torch.from_numpy(self.base.read(start, stop))
            x = layer.attention_input(hidden)
            if point != "attention_input":
                context = layer.attend(x).context
                x = context if point == "attention_output" else layer.mlp_input(layer.after_attention(hidden, context))
            x = layer.mlp_hidden(x) if point == "mlp_hidden" else x
            if not bool(torch.isfinite(x).all()):
                raise _not_finite(f"layer {index}: {point} holds NaN or Inf")
            yield x

    def _head(self) -> None:
        name = self.config.head_source
        width = self.config.hidden_size
        amax = self._tensor_amax(name, self.candidates)
        by_name = {f"head {precision.describe()}": precision for precision in self._fitting(width)}

        def rounded(rows: torch.Tensor, variant: str) -> torch.Tensor:
            return torch.from_numpy(_rounded(rows.numpy(), by_name[variant], amax))

        variants = {unit: self._final(states) for unit, states in self.variants.items()}
        heads = dict.fromkeys(by_name, rounded)
        found = mean_divergences(self._final(self.base), variants, heads, self._head_blocks)
        for unit in self.units:
            self._scale(unit, max(found[unit.name], 0.0))
        divergences = {precision: max(found[variant], 0.0) for variant, precision in by_name.items()}
        self.units.append(Unit("head", (HEAD,), divergences))

    def _final(self, states: Activations) -> torch.Tensor:
        """What the head multiplies, at evenly spread positions: [R, H]."""
        n, length, width = self.shape
        gamma = torch.from_numpy(self._rows("model.norm.weight", 0, width))
        step = max(1, n * length // SCORED)
        rows = [torch.from_numpy(states.read(i, i + 1)).reshape(-1, width)[step - 1 :: step] for i in range(n)]
        return rms_norm(torch.cat(rows), gamma, self.config.rms_norm_eps)

    def _head_blocks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        name = self.config.head_source
        for start, stop in row_chunks((self.config.vocab_size, self.config.hidden_size)):
            yield start, stop, torch.from_numpy(self._rows(name, start, stop))

    def _add(self, name: str, tensors: tuple[str, ...], errors: dict[Precision, float]) -> None:
        self.units.append(Unit(name, tensors))
        self.errors[name] = errors

    def _scale(self, unit: Unit, measured: float) -> None:
        """KL at each candidate: the measured one times the ratio of output errors."""
        width = self.checkpoint.tensors[unit.tensors[0]].shape[1]
        errors = self.errors[unit.name]
        reference = errors[self._reference(width)]
        for precision in self._fitting(width):
            unit.divergences[precision] = measured * errors[precision] / reference if reference else 0.0

    def _tensor_amax(self, name: str, precisions: Sequence[Precision]) -> float | None:
        if not any(wants_tensor_amax(precision) for precision in precisions):
            return None
        return max(magnitude(self._rows(name, *chunk)) for chunk in row_chunks(self.checkpoint.tensors[name].shape))

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return read_tensor_rows(self.checkpoint, name, start, stop)


def _best_scale(inputs: Activations, weights: dict[str, np.ndarray], precision: Precision) -> np.ndarray | None:
    """mean|x|^a / sqrt(max * min) [K] of least output error (AWQ, equation 5); None where no scale is better."""
    means = [x.abs().mean((0, 1)) for x in _batches_of(inputs)]
    mean = torch.stack(means).mean(0).clamp_min(torch.finfo(torch.float32).tiny).double()
    choices: list[np.ndarray | None] = [None]
    for exponent in EXPONENTS:
        power = mean**exponent
        choices.append((power / (power.max() * power.min()).sqrt()).float().numpy())

    def error(scale: np.ndarray | None) -> float:
        rounded = {name: _rounded_under(values, precision, scale) for name, values in weights.items()}
        return _output_error(inputs, weights, rounded)

    return min(choices, key=error)


def _output_error(inputs: Activations, weights: dict[str, np.ndarray], rounded: dict[str, np.ndarray]) -> float:
    """Squared error of the outputs of all matrices that read a point."""
    change = torch.from_numpy(np.concatenate([rounded[name] - weights[name] for name in weights]))
    products = (x.reshape(-1, change.shape[1]) @ change.T for x in _batches_of(inputs))
    return sum(float(product.square().sum(dtype=torch.float64)) for product in products)


def _batches_of(inputs: Activations) -> Iterator[torch.Tensor]:
    for start, stop in batches(inputs.shape[0], BATCH):
        yield torch.from_numpy(inputs.read(start, stop))


def _rounded_under(values: np.ndarray, precision: Precision, scale: np.ndarray | None) -> np.ndarray:
    """The same, rounded after its columns were multiplied by `scale` [K], which is taken out again."""
    if scale is None:
        return _rounded(values, precision, magnitude(values))
    wide = values * scale
    wide = _rounded(wide, precision, magnitude(wide))
    wide /= scale
    return wide


def _rounded(values: np.ndarray, precision: Precision, amax: float | None) -> np.ndarray:
    """float32 values as a precision gives them back."""
    return quantize_rows(values, precision, amax if wants_tensor_amax(precision) else None).dequantize()
