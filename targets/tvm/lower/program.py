"""What a slice of the model becomes: calls of kernels on named tensors. Nothing here knows TVM."""

from dataclasses import dataclass

from targets.tvm.stored import StoredWeight

Size = int | str
"""A length: a number, or a letter that stands for what the step brings (`T` tokens, `R` segments, `Q` rows wanted,
`B` cache rows, `C` blocks of 32 cached positions, `S` cached positions)."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that a function takes or a kernel fills."""

    name: str
    dtype: str
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class Kernel:
    """A kernel before it is generated: the factory of `targets.tvm.kernels` and its arguments after isa and name."""

    factory: str
    arguments: tuple[object, ...]


@dataclass(frozen=True)
class Call:
    """One kernel call; the kernel's parameters are `inputs`, then `written` (changed in place), then `outputs`."""

    kernel: Kernel
    inputs: tuple[Tensor, ...]
    written: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Program:
    """The body of one VM function. Equal programs are one function, whatever weights they are called with.

    `result` is the tensor that the function fills or changes in place.
    """

    kind: str
    parameters: tuple[Tensor, ...]
    cache: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    calls: tuple[Call, ...]
    result: Tensor


@dataclass(frozen=True)
class LoweredSlice:
    """A slice's program and what is stored for each of its weights."""

    label: str
    program: Program
    stored: tuple[StoredWeight, ...]


@dataclass(frozen=True)
class LoweredModel:
    """The slices in the order the data takes."""

    embedding: LoweredSlice
    layers: tuple[LoweredSlice, ...]
    head: LoweredSlice

    @property
    def slices(self) -> tuple[LoweredSlice, ...]:
        return (self.embedding, *self.layers, self.head)

    @property
    def layer_functions(self) -> tuple[str, ...]:
        """The VM function of each layer: `layer`, or `layer_0`, `layer_1`, ... where layers differ."""
        distinct = list(dict.fromkeys(layer.program for layer in self.layers))
        names = ["layer"] if len(distinct) == 1 else [f"layer_{number}" for number in range(len(distinct))]
        return tuple(names[distinct.index(layer.program)] for layer in self.layers)
