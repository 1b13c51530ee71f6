"""Writing the quantized Hugging Face checkpoint of ModelOpt, which TensorRT-LLM, vLLM and SGLang load."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.weight_rows import sharing_scale
from exporter.core.canonical import CheckpointWeight
from exporter.core.recipe import Precision
from exporter.core.weights import QuantizedRows
from targets.base import BuildSource
from targets.tensorrt_llm.formats import HF, float_kind, hf_algorithm, matrix_precisions
from targets.tensorrt_llm.hf_config import excluded_modules, producer, quantization, write_configs
from targets.tensorrt_llm.hf_tensors import (
    Fp8ChannelEncoder,
    Fp8Encoder,
    Int4Encoder,
    Int4Fp8Encoder,
    KvScaleEncoder,
    Nvfp4Encoder,
    SharedAmax,
    kv_scale_of,
)
from targets.tensorrt_llm.nvfp4_scales import common_scale, matrix_scale
from targets.tensorrt_llm.piece import Encoder, Piece, float_piece, input_scale
from targets.tensorrt_llm.served_rows import served_rows
from targets.tensorrt_llm.streamed_files import SHARD_BYTES, Report, write_pieces
from targets.tensorrt_llm.written import Written

SAMPLE_ROWS = 64


def write_hf(source: BuildSource, out_dir: Path, progress: Report, shard_bytes: int = SHARD_BYTES) -> Written:
    """Weights, config.json, generation_config.json and hf_quant_config.json. The recipe is one that
    `targets.tensorrt_llm.support` takes. Raises InputError where a scale of activations was not calibrated."""
    config = source.checkpoint.config
    kind = float_kind(config, source.recipe)
    pieces = list(HfPieces(source, kind))
    files, size = write_pieces(out_dir, pieces, served_rows(source.rows, HF, kind), progress, shard_bytes)
    found = quant_config(source)
    files += write_configs(out_dir, source.checkpoint.path, config, kind, found)
    return Written(files, size, report(source, kind, found))


def coded_matrices(source: BuildSource) -> dict[str, Precision]:
    """The matrices that are quantized, by module."""
    found = matrix_precisions(source.checkpoint.config, source.recipe)
    return {module: precision for module, precision in found.items() if precision.is_coded}


def quant_config(source: BuildSource) -> dict[str, Any] | None:
    """hf_quant_config.json; None for a checkpoint in floats."""
    modules = matrix_precisions(source.checkpoint.config, source.recipe)
    coded = coded_matrices(source)
    if not coded:
        return None
    precision = next(iter(coded.values()))
    algorithm = hf_algorithm(precision)
    assert algorithm is not None
    excluded = excluded_modules(coded, (module for module in modules if module not in coded))
    return quantization(algorithm, precision, source.recipe.kv_cache, excluded, producer())


def report(source: BuildSource, kind: str, found: dict[str, Any] | None) -> dict[str, Any]:
    """What the manifest says of the checkpoint."""
    details = found["quantization"] if found else {"quant_algo": None, "kv_cache_quant_algo": None}
    facts: dict[str, Any] = {"format": HF, "float_type": kind, **details}
    notes = {
        "FP8": "servers that compute q, k and v (gate and up) in one product round these weights once more, to the "
        "largest of their scales",
        "W4A16_AWQ": f"TensorRT-LLM keeps the scales of groups in {kind}; vLLM and SGLang read no W4A16_AWQ checkpoint",
        "W4A8_AWQ": "TensorRT-LLM keeps the scales of groups in float16; vLLM and SGLang read no W4A8_AWQ checkpoint",
    }
    note = notes.get(str(details["quant_algo"]))
    return {**facts, "note": note} if note else facts


class CodedPieces(ABC):
    """Every tensor of the source, in its order, with the tensors that store it in one form of checkpoint."""

    def __init__(self, source: BuildSource, kind: str) -> None:
        self.source, self.kind = source, kind
        self.coded = coded_matrices(source)
        self._matrix_scales: dict[str, np.float32] = {}

    def __iter__(self) -> Iterator[Piece]:
        for name, shape in self.source.checkpoint.config.tensor_shapes.items():
            yield self._with_cache(self._piece(name, shape))

    def _piece(self, name: str, shape: tuple[int, ...]) -> Piece:
        module = name.removesuffix(".weight")
        if module not in self.coded:
            return float_piece(name, shape, self.kind)
        precision = self.coded[module]
        return Piece(name, shape, precision, self._encoder(module, (shape[0], shape[1]), precision))

    @property
    def _cache_scales(self) -> Mapping[int, tuple[float, float]]:
        """Of layers whose cache is in fp8."""
        return (self.source.kv_scales or {}) if self.source.recipe.kv_cache == "fp8" else {}

    def _matrix_scale(self, module: str) -> np.float32:
        together = siblings(module)
        if together[0] not in self._matrix_scales:
            self._matrix_scales[together[0]] = shared_matrix_scale(self.source, together)
        return self._matrix_scales[together[0]]

    @abstractmethod
    def _with_cache(self, piece: Piece) -> Piece:
        """The piece with the scales of a cache that are written beside it."""

    @abstractmethod
    def _encoder(self, module: str, shape: tuple[int, int], precision: Precision) -> Encoder:
        """How a quantized matrix is stored."""


class HfPieces(CodedPieces):
    """ModelOpt's form."""

    def __init__(self, source: BuildSource, kind: str) -> None:
        super().__init__(source, kind)
        self._amax: dict[str, SharedAmax] = {}

    def _with_cache(self, piece: Piece) -> Piece:
        """The scale of keys, or of values, comes with the matrix that computes them."""
        found = kv_scale_of(piece.name.removesuffix(".weight"), self._cache_scales)
        return piece if found is None else replace(piece, encoder=KvScaleEncoder(piece.encoder, *found))

    def _encoder(self, module: str, shape: tuple[int, int], precision: Precision) -> Encoder:
        algorithm, scales = hf_algorithm(precision), self.source.input_scales
        group = precision.group_of(shape[1])
        if algorithm == "FP8":
            return Fp8Encoder(module, shape, input_scale(scales, module))
        if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            return Fp8ChannelEncoder(module, shape)
        if algorithm == "W4A16_AWQ":
            return Int4Encoder(module, shape, group, self.kind)
        if algorithm == "W4A8_AWQ":
            amax = self._amax.setdefault(siblings(module)[0], SharedAmax())
            return Int4Fp8Encoder(module, shape, group, self.kind, input_scale(scales, module), amax)
        assert algorithm == "NVFP4"
        return Nvfp4Encoder(module, shape, input_scale(scales, module), self._matrix_scale(module))


def siblings(module: str) -> tuple[str, ...]:
    """All matrices with the same input, in order."""
    names = sharing_scale(f"{module}.weight", Precision("nvfp4", 16))
    return tuple(name.removesuffix(".weight") for name in names)


def shared_matrix_scale(source: BuildSource, modules: tuple[str, ...]) -> np.float32:
    """The float32 scale of nvfp4 matrices with one input. Reads their weights once, and the first of their codes."""
    names = [f"{module}.weight" for module in modules]
    near = matrix_scale(source.checkpoint, names)
    samples = []
    for name in names:
        stop = min(SAMPLE_ROWS, source.checkpoint.tensors[name].shape[0])
        rows = source.rows(CheckpointWeight((name,), Precision("nvfp4", 16)), 0, stop)
        assert isinstance(rows, QuantizedRows)
        samples.append(rows.scales)
    return common_scale(samples, near, names)
