"""Lowering one slice: what each canonical value stands for, and the kernel calls written so far."""

from dataclasses import dataclass

import onnx_ir as ir

from exporter.core.canonical import CheckpointWeight, Slice
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.errors import UnsupportedError
from exporter.core.weights import weight_shape
from targets.tvm.isa import Isa
from targets.tvm.lower.program import Call, Kernel, LoweredSlice, Program, Size, Tensor
from targets.tvm.lower.tensors import cache_tensors, parameters
from targets.tvm.lower.values import Lowered, Matrix, StepInput, Stream, WeightRef
from targets.tvm.stored import StoredWeight, stored_type, value_shape


@dataclass(frozen=True)
class Setting:
    """What is the same for all slices of a build. `kv_cache` is `fp32`, `fp16` or `int8`."""

    config: ModelConfig
    checkpoint: Checkpoint
    isa: Isa
    kv_cache: str


class SliceLowering:
    """One slice on its way to a program. `values` says what each canonical value stands for."""

    def __init__(self, part: Slice, setting: Setting) -> None:
        self.slice, self.setting = part, setting
        self.values: dict[ir.Value, Lowered] = {}
        self.parameters = {tensor.name: tensor for tensor in parameters(part.kind, setting.config)}
        self.cache = cache_tensors(setting.config, setting.kv_cache, setting.isa) if part.kind == "layer" else ()
        self.written: dict[Lowered, tuple[Tensor, ...]] = {}
        self.stream = Stream()
        self._calls: list[Call] = []
        self._weights: dict[str, tuple[StoredWeight, Tensor]] = {}
        for value in part.structure.graph.inputs:
            self.values[value] = self._weight_input(str(value.name)) or StepInput(str(value.name))
        for value in part.structure.graph.inputs:
            if value.name == "hidden":
                self.values[value] = self.stream

    def lowered(self, value: ir.Value | None) -> Lowered:
        """What a value stands for; None for an absent input or a constant."""
        return None if value is None else self.values.get(value)

    def refuse(self, why: str) -> UnsupportedError:
        return UnsupportedError(
            "tvm.lowering",
            f"{self.slice.label} of the canonical model cannot be lowered to TVM kernels: {why}",
            "this is a fault of the canonical model, not of the checkpoint: please report it",
        )

    def shape(self, ref: WeightRef) -> tuple[int, ...]:
        """The shape of a weight."""
        if not isinstance(ref.weight, CheckpointWeight):
            return value_shape(ref.weight)
        return weight_shape(self.setting.checkpoint, ref.weight)

    def call(
        self,
        kernel: Kernel,
        inputs: list[Tensor],
        outputs: list[tuple[str, tuple[Size, ...]]] | None = None,
        written: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """Write a kernel call; `outputs` (dtype, shape) become new tensors, which are returned."""
        number = len(self._calls)
        fresh = tuple(
            Tensor(
                f"{kernel.factory}_{number}_{index}" if len(outputs or ()) > 1 else f"{kernel.factory}_{number}", *what
            )
            for index, what in enumerate(outputs or ())
        )
        self._calls.append(Call(kernel, tuple(inputs), written, fresh))
        return fresh

    def weight(self, ref: WeightRef | Matrix, interleaved: bool = False) -> Tensor:
        """The stored form of a weight, as one of the function's weights. Raises where it is used in two forms."""
        stored = StoredWeight(ref.name, ref.weight, interleaved)
        if ref.name not in self._weights:
            dtype, shape = stored_type(stored, self.setting.checkpoint, self.setting.isa)
            self._weights[ref.name] = stored, Tensor(ref.name, dtype, shape)
        known, tensor = self._weights[ref.name]
        if known != stored:
            raise self.refuse(f"{ref.name} is used as gate and up and in another way")
        return tensor

    def vector(self, ref: WeightRef, length: int) -> Tensor:
        """A float32 weight of one dimension."""
        found = self.shape(ref)
        if not ref.is_plain or not isinstance(ref.weight, CheckpointWeight) or found != (length,):
            raise self.refuse(f"{ref.name} is {list(found)}, a vector of {length} is needed")
        if ref.weight.precision.kind != "fp32":
            raise self.refuse(f"{ref.name} is stored as {ref.weight.precision.describe()}, vectors are fp32")
        return self.weight(ref)

    def finished(self, result: Tensor) -> LoweredSlice:
        """The slice's program; `result` is what its function fills."""
        program = Program(
            self.slice.kind,
            tuple(self.parameters.values()),
            self.cache,
            tuple(tensor for _, tensor in self._weights.values()),
            tuple(self._calls),
            result,
        )
        prefix = "" if self.slice.index is None else f"layers.{self.slice.index}."
        stored = tuple(
            StoredWeight(prefix + weight.name, weight.weight, weight.interleaved)
            for weight, _ in self._weights.values()
        )
        return LoweredSlice(self.slice.label, program, stored)

    def _weight_input(self, name: str) -> WeightRef | None:
        weights = self.slice.weights
        base, _, part = name.rpartition(".")
        if name in weights:
            weight = weights[name]
            cast = isinstance(weight, CheckpointWeight) and weight.precision.kind in ("bf16", "fp16")
            return WeightRef(name, weight, cast=cast)
        if base in weights and part in ("codes", "scales", "zero_points"):
            return WeightRef(base, weights[base], part=part)
        return None
