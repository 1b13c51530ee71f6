"""Timing one layer under two tunings, turn by turn, so that a change of the machine's pace meets both."""

import time
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from exporter.core.machine import physical_cores
from targets.tvm.compile import compile_module
from targets.tvm.devices import Device
from targets.tvm.library import EngineLibrary, import_ffi
from targets.tvm.pages import allocate_pages
from targets.tvm.tuning import Tuning

if TYPE_CHECKING:
    from targets.tvm.lower.program import LoweredModel, Tensor

STREAMED_BYTES = 256 << 20
"""Weights that decode runs over before it meets the same again: more than caches hold."""
LONGEST, BLOCK = 512, 32
ROUNDS = {"decode": 15, "prefill": 5}
# Every value of a weight of that type: neither zero nor so small that arithmetic slows down.
FILL: dict[str, float] = {"float32": 0.01, "float16": 0.01, "uint16": 0x3C24, "uint8": 0x11}


class LayerTimer:
    """Compares tunings on the first layer of a model; used in a `with` block. Kernels run on all physical cores."""

    def __init__(self, model: "LoweredModel", device: Device) -> None:
        self._program, self._device = model.layers[0].program, device
        self._libraries: dict[Tuning, EngineLibrary] = {}
        self._dlpack = import_ffi().from_dlpack
        size = sum(_nbytes(tensor, {}) for tensor in self._program.weights)
        copies = max(1, min(len(model.layers), -(-STREAMED_BYTES // size)))
        self._weights = [self._tensors(self._program.weights, {}) for _ in range(copies)]

    def __enter__(self) -> Self:
        self._folder = TemporaryDirectory(prefix="enginesmith-tune-")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._libraries.clear()
        self._folder.cleanup()

    def compare(self, phase: str, a: Tuning, b: Tuning) -> float:
        """The median, over turns, of b's seconds a token over a's."""
        self._libraries = {tuning: library for tuning, library in self._libraries.items() if tuning in (a, b)}
        first, second = self._step(phase, a), self._step(phase, b)
        for step in (first, second):
            step()
        return median(_ratio(first, second, swap=turn % 2 == 1) for turn in range(ROUNDS[phase]))

    def _step(self, phase: str, tuning: Tuning) -> Callable[[], float]:
        """A function that runs the layer and returns seconds a token."""
        tokens = 1 if phase == "decode" else tuning.chunk
        layer = self._library(tuning).function("layer")
        sizes = {"T": tokens, "R": 1, "Q": 1, "B": 1, "C": LONGEST // BLOCK, "S": LONGEST}
        hidden, *indices = (self._array(tensor, sizes) for tensor in self._program.parameters)
        hidden[...] = np.random.default_rng(0).normal(size=hidden.shape)
        for array in indices:
            # Every token stands at position 0 of row 0: the same cell is written again and again.
            array[...] = (0, 0, tokens, 0) if array.ndim == 2 else 0
        given = [self._dlpack(array) for array in (hidden, *indices)]
        cache = self._tensors(self._program.cache, sizes)
        runs = self._weights if phase == "decode" else self._weights[:1]

        def run() -> float:
            begin = time.perf_counter()
            for weights in runs:
                layer(*given, cache, weights)
            return (time.perf_counter() - begin) / tokens

        return run

    def _library(self, tuning: Tuning) -> EngineLibrary:
        if tuning not in self._libraries:
            from targets.tvm.lower.kernel_table import generate
            from targets.tvm.lower.relax_module import ModuleBuilder

            builder = ModuleBuilder(self._device.isa, tuning.chunk, partial(generate, tuning=tuning))
            builder.add_function("layer", self._program)
            path = Path(self._folder.name) / f"{len(list(Path(self._folder.name).iterdir()))}.so"
            compile_module(builder.module(), self._device, path)
            library = EngineLibrary(path)
            library.use_threads(physical_cores())
            self._libraries[tuning] = library
        return self._libraries[tuning]

    def _tensors(self, tensors: "tuple[Tensor, ...]", sizes: dict[str, int]) -> tuple[Any, ...]:
        return tuple(self._dlpack(self._array(tensor, sizes)) for tensor in tensors)

    def _array(self, tensor: "Tensor", sizes: dict[str, int]) -> np.ndarray:
        """Memory as an engine would have it, every page resident."""
        array = allocate_pages(_nbytes(tensor, sizes)).view(tensor.dtype).reshape(_shape(tensor, sizes))
        array[...] = 0 if sizes else FILL[tensor.dtype]
        return array


def _shape(tensor: "Tensor", sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)


def _nbytes(tensor: "Tensor", sizes: dict[str, int]) -> int:
    return prod(_shape(tensor, sizes)) * np.dtype(tensor.dtype).itemsize


def _ratio(a: Callable[[], float], b: Callable[[], float], swap: bool) -> float:
    """b's time over a's; `swap` runs b first."""
    if swap:
        after = b()
        return after / a()
    before = a()
    return b() / before
