"""Whole calls of an engine's graph, and what the simulation says of each, from one walk over its layers."""

from dataclasses import dataclass

import numpy as np

from exporter.parity.inputs import ParityInputs
from exporter.parity.reference import EagerLayer, EagerModel
from targets.tensorrt.engine_index import EngineIndex

TOKENS = ("input_ids", "position_ids", "write_indices", "last_rows")


@dataclass(frozen=True)
class Case:
    """One call: `feeds` by input, caches in float32; `expected` by output, NaN where nothing is defined."""

    feeds: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]

    def is_fed(self, feeds: dict[str, np.ndarray]) -> bool:
        """Whether these are its tokens, at its positions."""
        return all(np.array_equal(feeds[name], self.feeds[name]) for name in TOKENS if name in self.feeds)


@dataclass
class Row:
    """One row on its way through the layers: ids [S] after `past` positions, and its caches so far, of all layers."""

    ids: np.ndarray
    past: int
    before: list[tuple[np.ndarray, np.ndarray]]
    after: list[tuple[np.ndarray, np.ndarray]]
    hidden: np.ndarray

    def advance(self, layer: EagerLayer, index: int) -> None:
        past = self.before[index] if self.past else None
        out = layer.run(self.hidden, past)
        self.hidden = out.hidden
        self.after.append((out.keys, out.values))


def polygraphy_cases(simulation: EagerModel, inputs: ParityInputs, index: EngineIndex) -> list[Case]:
    """A prompt of one row; one more token after it, over its caches; rows of different lengths together. Without a
    cache the decoding step is left out."""
    longest = index.longest_step - 1 if index.has_cache and index.longest_step > 1 else index.longest_step
    prompt = inputs.long_row[: min(inputs.prefill, longest)]
    batch = min(index.profile("prefill").batch[2], len(inputs.ragged))
    lengths = [min(length, index.longest_step) for length in inputs.ragged_prompts[:batch]]
    ragged = [row[:length] for row, length in zip(inputs.ragged, lengths, strict=False)]
    step = inputs.long_row[len(prompt) : len(prompt) + 1]
    groups = [[_row(prompt)], [_row(step, len(prompt))] if index.has_cache else [], [_row(row) for row in ragged]]
    _walk(simulation, groups)
    return [_case(simulation, group, index) for group in groups if group]


def _row(ids: np.ndarray, past: int = 0) -> Row:
    return Row(ids, past, [], [], np.empty(0))


def _walk(simulation: EagerModel, groups: list[list[Row]]) -> None:
    """Every row through every layer; the decoding step starts from what its prompt left in that layer."""
    (prompt,), decoding, _ = groups
    rows = [row for group in groups for row in group]
    for row, hidden in zip(rows, simulation.embed([row.ids for row in rows]), strict=True):
        row.hidden = hidden
    for index in range(simulation.config.num_layers):
        layer = simulation.layer(index)
        prompt.advance(layer, index)
        for row in decoding:
            row.before.append(prompt.after[index])
        for row in rows[1:]:
            row.advance(layer, index)


def _case(simulation: EagerModel, rows: list[Row], index: EngineIndex) -> Case:
    """Rows of a step side by side, right-padded; padding repeats the last position, as the runner's does."""
    lengths = np.array([len(row.ids) for row in rows])
    columns = np.arange(lengths.max())
    inside = columns < lengths[:, None]
    starts = np.array([row.past for row in rows])
    ids = np.zeros(inside.shape, np.int64)
    ids[inside] = np.concatenate([row.ids for row in rows])
    feeds = {
        "input_ids": ids,
        "position_ids": starts[:, None] + np.minimum(columns, lengths[:, None] - 1),
        "last_rows": lengths - 1,
    }
    expected = {"logits": simulation.logits(np.stack([row.hidden[-1] for row in rows]))}
    if index.has_cache:
        feeds["write_indices"] = starts
        feeds |= {f"past_key_values.{name}": values for name, values in _caches(rows, index).items()}
        expected |= _last_cache(rows, index)
    return Case(feeds, expected)


def _caches(rows: list[Row], index: EngineIndex) -> dict[str, np.ndarray]:
    """Past keys and values [B, Hkv, M, D] by layer, zeros behind what a row holds."""
    caches = {name: np.zeros(index.cache_shape(len(rows)), np.float32) for name in index.cache_names}
    for number, row in enumerate(rows):
        for layer, pair in enumerate(row.before):
            for which, values in zip(("key", "value"), pair, strict=True):
                caches[f"{layer}.{which}"][number, :, : values.shape[1]] = values
    return caches


def _last_cache(rows: list[Row], index: EngineIndex) -> dict[str, np.ndarray]:
    """Keys and values that the last layer leaves; NaN behind each row's length."""
    layer = index.num_layers - 1
    expected = {}
    for place, which in enumerate(("key", "value")):
        array = np.full(index.cache_shape(len(rows)), np.nan, np.float32)
        for number, row in enumerate(rows):
            values = row.after[layer][place]
            array[number, :, : values.shape[1]] = values
        expected[f"present.{layer}.{which}"] = array
    return expected
