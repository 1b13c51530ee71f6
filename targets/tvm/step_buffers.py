"""What one step hands to an engine, kept between steps: small integer tensors, the residual stream, logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

ALIGNMENT = 64


@dataclass(frozen=True)
class RowPart:
    """Consecutive new tokens of one cache row within a step."""

    row: int
    ids: np.ndarray
    past: int
    """Positions cached before."""
    last: bool
    """Whether the row's logits are wanted after its last token."""


class Buffer:
    """An aligned array whose first `count` entries are handed over as a tensor, made once for each count."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, from_dlpack: Callable[[np.ndarray], Any]) -> None:
        self.array = aligned_empty(shape, np.dtype(dtype))
        self._from_dlpack = from_dlpack
        self._tensors: dict[int, Any] = {}

    def tensor(self, count: int) -> Any:
        """The first `count` entries along the first axis, as TVM takes them."""
        if count not in self._tensors:
            self._tensors[count] = self._from_dlpack(self.array[:count])
        return self._tensors[count]


class StepBuffers:
    """Buffers for steps of up to `chunk` tokens and `batch` rows, with `head` logits each."""

    def __init__(self, chunk: int, batch: int, hidden: int, head: int, from_dlpack: Callable[..., Any]) -> None:
        def buffer(*shape: int, dtype: Any = np.int32) -> Buffer:
            return Buffer(shape, dtype, from_dlpack)

        self._ids, self._positions, self._rows = buffer(chunk), buffer(chunk), buffer(chunk)
        self._segments, self._wanted = buffer(batch, 4), buffer(batch)
        self.hidden = buffer(chunk, hidden, dtype=np.float32)
        self.logits = buffer(batch, head, dtype=np.float32)

    def fill(self, parts: list[RowPart]) -> tuple[Any, ...]:
        """ids, positions, token_rows, segments, out_rows, hidden and logits as tensors, in the order of `forward`."""
        first = wanted = 0
        for number, part in enumerate(parts):
            count = len(part.ids)
            end = first + count
            self._ids.array[first:end] = part.ids
            self._positions.array[first:end] = np.arange(part.past, part.past + count)
            self._rows.array[first:end] = part.row
            self._segments.array[number] = (part.row, first, count, part.past)
            first = end
            if part.last:
                self._wanted.array[wanted] = end - 1
                wanted += 1
        if not wanted:  # kernels take no empty matrices: the logits of one token are computed and not used
            self._wanted.array[0] = first - 1
            wanted = 1
        tokens = [buffer.tensor(first) for buffer in (self._ids, self._positions, self._rows)]
        rest = (self._segments.tensor(len(parts)), self._wanted.tensor(wanted))
        return (*tokens, *rest, self.hidden.tensor(first), self.logits.tensor(wanted))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that starts on a 64-byte boundary, as the kernels' vector loads need; not initialised."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def cut_into_steps(rows: list[RowPart], chunk: int) -> list[list[RowPart]]:
    """Steps of up to `chunk` tokens, rows in their order; a long row is cut, short ones share a step."""
    steps: list[list[RowPart]] = [[]]
    room = chunk
    for row in rows:
        done = 0
        while done < len(row.ids):
            if not room:
                steps.append([])
                room = chunk
            ids = row.ids[done : done + room]
            ends = done + len(ids) == len(row.ids)
            steps[-1].append(RowPart(row.row, ids, row.past + done, row.last and ends))
            done, room = done + len(ids), room - len(ids)
    return steps if steps[-1] else []
