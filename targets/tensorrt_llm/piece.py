"""A tensor of the source checkpoint and the tensors it becomes in the files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from exporter.core.errors import InputError
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows
from targets.tensorrt_llm.formats import FLOAT_TYPES
from targets.tensorrt_llm.tensor_file import TensorSpec

Arrays = Mapping[str, np.ndarray]


class Encoder(Protocol):
    """Turns rows of one tensor into rows of the tensors that store it."""

    specs: tuple[TensorSpec, ...]

    def encode(self, rows: "np.ndarray | QuantizedRows") -> Arrays:
        """Rows [start, stop) of the source as rows of the stored tensors, by name, in proportion: two rows of int4 make
        one of bytes. Called on several threads, in any order; never with an odd number of rows but at the end."""
        ...

    def constants(self) -> Arrays:
        """What does not come by rows; asked for when all rows of all tensors were encoded."""
        ...


@dataclass(frozen=True)
class Piece:
    """A tensor of the source by its name, read at `precision` and written by `encoder`."""

    name: str
    shape: tuple[int, ...]
    precision: Precision
    encoder: Encoder


class FloatEncoder:
    """A tensor in the checkpoint's float type."""

    def __init__(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        self.specs: tuple[TensorSpec, ...] = (TensorSpec(name, FLOAT_TYPES[kind], shape),)

    def encode(self, rows: "np.ndarray | QuantizedRows") -> Arrays:
        assert isinstance(rows, np.ndarray)
        return {self.specs[0].name: rows}

    def constants(self) -> Arrays:
        return {}


def float_piece(name: str, shape: tuple[int, ...], kind: str) -> Piece:
    """A tensor that is not quantized."""
    return Piece(name, shape, Precision(kind), FloatEncoder(name, shape, kind))


def scalar(value: float | np.float32) -> np.ndarray:
    """float32 []."""
    return np.array(value, np.float32)


def input_scale(scales: Mapping[str, float], module: str) -> float:
    """The calibrated scale of a module's input. InputError where it was not calibrated."""
    if module not in scales:
        what = f"no scale of the input of {module} was calibrated"
        raise InputError("calibration.input_scale", what, "give --calibration or --qparams")
    return scales[module]
