"""A Hugging Face checkpoint directory whose tensors are read one at a time, on demand."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from exporter.core.config import ModelConfig, read_json
from exporter.core.errors import InputError
from exporter.core.safetensors_file import TensorInfo, read_header, read_rows
from exporter.core.strict_json import shorten

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Buffers that older exporters saved; they are recomputed from the config, as transformers does.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """The directory, its architecture, and where each tensor lies. Opening it reads headers only."""

    path: Path
    config: ModelConfig
    tensors: dict[str, TensorInfo]

    @staticmethod
    def open(path: Path | str, config: ModelConfig | None = None) -> "Checkpoint":
        """Open a directory and check names and shapes of all tensors against config.json.

        Raises InputError (pickled, truncated, missing, extra or misshapen tensors) or UnsupportedError.
        """
        path = Path(path)
        config = config or ModelConfig.from_directory(path)
        tensors: dict[str, TensorInfo] = {}
        for file, names in _weight_files(path).items():
            found = read_header(file)
            _check_index(file, names, found)
            tensors.update(found)
        tensors = {name: info for name, info in tensors.items() if not name.endswith(IGNORED_SUFFIXES)}
        if config.tie_word_embeddings:
            tensors = _tie(tensors)
        _check_tensors(config, tensors)
        return Checkpoint(path, config, tensors)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor, stored dtype. NaN and Inf are refused here, where they enter."""
        rows = read_rows(self.tensors[name], start, stop)
        if not _all_finite(rows):
            raise InputError(
                "checkpoint.not_finite",
                f"tensor {name!r} holds NaN or Inf (rows {start} to {stop})",
                "the checkpoint is broken: train or download it again",
            )
        return rows

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, stored dtype."""
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def iterate_bytes(self) -> Iterator[bytes]:
        """Every byte that determines the model: config.json, then the weight files in name order."""
        yield (self.path / "config.json").read_bytes()
        for file in sorted({info.path for info in self.tensors.values()}):
            with file.open("rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    yield chunk

    @cached_property
    def digest(self) -> str:
        """SHA-256 over `iterate_bytes`, hexadecimal: the identity of the source in manifests."""
        state = hashlib.sha256()
        for chunk in self.iterate_bytes():
            state.update(chunk)
        return state.hexdigest()


def _all_finite(array: np.ndarray) -> bool:
    """Whether no exponent is all ones.

    Half-width floats are compared as integers, whose order is that of the magnitudes: the largest
    unsigned value finds a negative NaN or Inf, the largest signed one a positive. No temporary is made.
    """
    if array.dtype.itemsize == 4 or not array.size:
        return bool(np.isfinite(array).all())
    infinity = 0x7F80 if array.dtype.name == "bfloat16" else 0x7C00
    return bool(array.view(np.uint16).max() < infinity | 0x8000 and array.view(np.int16).max() < infinity)


def _tie(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """One matrix for embedding and head, under the embedding's name; a checkpoint may hold either, or both alike."""
    tensors = dict(tensors)
    head = tensors.pop(HEAD, None)
    if head is None:
        return tensors
    embedding = tensors.setdefault(EMBEDDING, head)
    if not _same_bytes(embedding, head):
        raise InputError(
            "checkpoint.tied_mismatch",
            f"config.json ties embedding and head, but {EMBEDDING} and {HEAD} differ",
            "set tie_word_embeddings to false in config.json, or remove the tensor that is not meant",
        )
    return tensors


def _same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    if one == other:
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    step = max(1, CHUNK_BYTES * one.shape[0] // max(one.nbytes, 1)) if one.shape else 1
    starts = range(0, one.shape[0], step) if one.shape else range(0)
    parts = ((start, min(start + step, one.shape[0])) for start in starts)
    return all(read_rows(one, *part).tobytes() == read_rows(other, *part).tobytes() for part in parts)


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a directory, with the tensor names that an index promises in each."""
    if (path / SINGLE).is_file():
        return {path / SINGLE: None}
    if (path / INDEX).is_file():
        return _indexed_files(path)
    if not path.is_dir():
        raise InputError("checkpoint.missing", f"{path} is not a directory", "give a checkpoint directory")
    pickles = sorted(p.name for pattern in PICKLES for p in path.glob(pattern))
    if pickles:
        raise InputError(
            "checkpoint.pickled",
            f"{path} holds pickled weights ({', '.join(pickles[:3])}), which can run code when opened",
            "convert the checkpoint to safetensors; enginesmith never opens pickles",
        )
    raise InputError("checkpoint.weights_missing", f"{path} has neither {SINGLE} nor {INDEX}", "download the weights")


def _indexed_files(path: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(path / INDEX, "checkpoint.index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("checkpoint.index", f"{INDEX} has no weight_map", "download the checkpoint again")
    promised: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not _is_shard_name(file):
            why = f"{INDEX} names {shorten(file)} for {shorten(name)}"
            raise InputError("checkpoint.index", why, "shards are *.safetensors files beside the index")
        promised.setdefault(file, set()).add(name)
    if missing := sorted(file for file in promised if not (path / file).is_file()):
        why = f"{len(missing)} of {len(promised)} shards are missing in {path}: {_some(missing)}"
        raise InputError("checkpoint.shard_missing", why, "download the checkpoint again")
    return {path / file: names for file, names in promised.items()}


def _is_shard_name(file: object) -> bool:
    """A plain file name, so that nothing outside the directory can be named (255 bytes: POSIX NAME_MAX)."""
    if not isinstance(file, str) or not file.endswith(".safetensors") or not file.isprintable():
        return False
    return Path(file).name == file and len(file.encode()) <= 255


def _check_index(file: Path, promised: set[str] | None, found: dict[str, TensorInfo]) -> None:
    if promised is None:
        return
    if missing := sorted(promised - found.keys()):
        raise InputError(
            "checkpoint.tensor_missing", f"{file.name} lacks {_some(missing)}, which the index promises", "re-download"
        )
    if extra := sorted(found.keys() - promised):
        raise InputError(
            "checkpoint.tensor_extra", f"{file.name} holds {_some(extra)}, not in the index", "re-download"
        )


def _check_tensors(config: ModelConfig, tensors: dict[str, TensorInfo]) -> None:
    expected = config.tensor_shapes
    if missing := [name for name in expected if name not in tensors]:
        raise InputError(
            "checkpoint.tensor_missing",
            f"{len(missing)} tensors are missing: {_some(missing)}",
            "the checkpoint is incomplete, or config.json belongs to another one",
        )
    if extra := sorted(tensors.keys() - expected.keys()):
        raise InputError(
            "checkpoint.tensor_extra",
            f"{len(extra)} tensors do not belong to a Llama of this config: {_some(extra)}",
            "config.json belongs to another checkpoint, or this is a variant enginesmith does not know",
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise InputError(
                "checkpoint.tensor_shape",
                f"tensor {name!r} has shape {list(tensors[name].shape)}, config.json asks for {list(shape)}",
                "config.json belongs to another checkpoint",
            )


def _some(names: list[str]) -> str:
    shown = (name if name.isprintable() and len(name) < 200 else shorten(name) for name in names[:5])
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
