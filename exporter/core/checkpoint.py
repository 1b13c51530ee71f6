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

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Buffers that older exporters saved; they are recomputed from the config, as transformers does.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
CHUNK_BYTES = 1 << 24


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
            tensors.pop("lm_head.weight", None)
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
    """Whether no exponent is all ones; on the bit pattern, several times faster than isfinite for bf16."""
    if array.dtype.itemsize == 4:
        return bool(np.isfinite(array).all())
    exponent = np.uint16(0x7F80 if array.dtype.name == "bfloat16" else 0x7C00)
    bits = array.view(np.uint16) & exponent
    return not bool((bits == exponent).any())


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a directory, with the tensor names that an index promises in each."""
    if (path / SINGLE).is_file():
        return {path / SINGLE: None}
    if (path / INDEX).is_file():
        return _indexed_files(path)
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
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError("checkpoint.index", f"{INDEX} names {file!r} for {name!r}", "shards lie beside the index")
        target = path / file
        if target not in files and not target.is_file():
            raise InputError("checkpoint.shard_missing", f"shard {file} is missing in {path}", "download it again")
        names = files.setdefault(target, set())
        assert names is not None
        names.add(name)
    return files


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
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
