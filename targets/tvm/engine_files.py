"""engine.json, read back: what an engine is and where its weights lie. targets/tvm/engine_index.py writes it."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from exporter.core import machine
from exporter.core.errors import ArtifactError
from exporter.core.strict_json import parse_json
from targets.tvm.file_names import INDEX
from targets.tvm.isa import PROFILES
from targets.tvm.kernels.cache_format import KINDS

FORMAT = 1
AGAIN = "build the engine again with this version of enginesmith"
TENSOR_TYPES = ("float32", "float16", "uint16", "uint8", "int32")
ALIGNMENT = 64
LARGEST = 2**31 - 1
"""Sizes are below this: token numbers and the like are int32."""
LONGEST_STEP = 1 << 16


@dataclass(frozen=True)
class TensorEntry:
    """A weight: numpy type, shape, and the first byte in weights.bin."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class EngineIndex:
    """The fields of engine.json that running needs. `layers` and `layer_functions` go layer by layer."""

    profile: str
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    head_size: int
    chunk: int
    cache_kind: str
    cache_block: int
    value_width: int
    tensors: dict[str, TensorEntry]
    embedding: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    layer_functions: tuple[str, ...]
    head: tuple[str, ...]

    @property
    def weights_bytes(self) -> int:
        """How long weights.bin is at least."""
        return max((tensor.offset + tensor.nbytes for tensor in self.tensors.values()), default=0)

    @property
    def weight_names(self) -> tuple[tuple[str, ...], ...]:
        """The weights of every part of a step, in its order."""
        return (self.embedding, *self.layers, self.head)


def read_index(folder: Path) -> EngineIndex:
    """Raises ArtifactError `tvm.index` when engine.json is missing or does not say what it must."""
    try:
        fields = parse_json((folder / INDEX).read_bytes())
        return _index(fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"the field {error}" if isinstance(error, KeyError) else str(error)
        raise ArtifactError("tvm.index", f"{INDEX} cannot be used: {what}", AGAIN) from error


def check_profile(name: str) -> None:
    """Raise ArtifactError `tvm.host` unless this machine runs the kernels of a profile: never a bad instruction."""
    isa = PROFILES.get(name)
    if isa is None:
        raise ArtifactError("tvm.index", f"{INDEX} names the unknown CPU profile {name!r}", AGAIN)
    if isa.machine != machine.machine():
        raise ArtifactError(
            "tvm.host",
            f"the engine's kernels are for {isa.machine} ({name}), this is {machine.machine()}",
            "build it again for this machine (--device host)",
        )
    if missing := sorted(set(isa.cpu_features) - machine.cpu_features()):
        raise ArtifactError(
            "tvm.host",
            f"the engine needs CPU features that this machine lacks: {', '.join(missing)}",
            "run it on a newer CPU, or build it again on this machine",
        )


def _index(fields: Any) -> EngineIndex:
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    tensors = {name: _tensor(name, entry) for name, entry in fields["tensors"].items()}
    cache = fields["cache"]
    index = EngineIndex(
        profile=str(fields["profile"]),
        **{name: _size(fields, name) for name in ("hidden_size", "num_layers", "num_kv_heads", "head_dim")},
        vocab_size=_size(fields, "vocab_size"),
        # Engines of versions that knew no classifiers do not say it.
        head_size=_size(fields, "head_size" if "head_size" in fields else "vocab_size"),
        chunk=_size(fields, "chunk"),
        cache_kind=cache["kind"],
        cache_block=_size(cache, "block"),
        value_width=_size(cache, "value_width"),
        tensors=tensors,
        embedding=_names(fields["embedding"], "embedding"),
        layers=tuple(_names(names, "layers") for names in fields["layers"]),
        layer_functions=_names(fields["layer_functions"], "layer_functions"),
        head=_names(fields["head"], "head"),
    )
    if index.cache_kind not in KINDS:
        raise ValueError(f"unknown cache {index.cache_kind!r}")
    if index.chunk > LONGEST_STEP:
        raise ValueError(f"chunk is {index.chunk}")
    if not len(index.layers) == len(index.layer_functions) == index.num_layers:
        raise ValueError(f"{len(index.layers)} layers are listed instead of {index.num_layers}")
    if unknown := [name for names in index.weight_names for name in names if name not in tensors]:
        raise ValueError(f"the weight {unknown[0]!r} is not among its tensors")
    return index


def _size(fields: dict[str, Any], name: str) -> int:
    value = fields[name]
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise ValueError(f"{name} is {value!r}")
    return value


def _names(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{name} holds something else than names")
    return tuple(value)


def _tensor(name: str, entry: dict[str, Any]) -> TensorEntry:
    shape, offset = tuple(entry["shape"]), entry["offset"]
    if entry["dtype"] not in TENSOR_TYPES or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"the tensor {name!r} is {entry['dtype']} {list(shape)}")
    if type(offset) is not int or offset < 0 or offset % ALIGNMENT:
        raise ValueError(f"the tensor {name!r} starts at {offset!r}")
    found = TensorEntry(entry["dtype"], shape, offset)
    if entry["bytes"] != found.nbytes:
        raise ValueError(f"the tensor {name!r} has {entry['bytes']!r} bytes, its shape {found.nbytes}")
    return found
