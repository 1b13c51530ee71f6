"""Writing compressed-tensors checkpoints, which vLLM and SGLang load, and transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.core.recipe import TENSOR, Precision
from targets.base import BuildSource
from targets.tensorrt_llm.compressed_config import quantization_config
from targets.tensorrt_llm.compressed_tensors_layout import (
    CompressedEncoder,
    KvScalesEncoder,
    Nvfp4PackedEncoder,
    PackedEncoder,
    PlainEncoder,
)
from targets.tensorrt_llm.formats import COMPRESSED, compressed_format, float_kind, matrix_precisions
from targets.tensorrt_llm.hf_config import CONFIG, GENERATION_CONFIG, model_config, write_generation_config
from targets.tensorrt_llm.hf_form import CodedPieces, coded_matrices
from targets.tensorrt_llm.piece import Piece, input_scale
from targets.tensorrt_llm.served_rows import served_rows
from targets.tensorrt_llm.streamed_files import SHARD_BYTES, Report, write_json, write_pieces
from targets.tensorrt_llm.written import Written


def write_compressed(source: BuildSource, out_dir: Path, progress: Report, shard_bytes: int = SHARD_BYTES) -> Written:
    """Weights, config.json and generation_config.json. The recipe is one that `targets.tensorrt_llm.support` takes.
    Raises InputError where a scale of activations was not calibrated."""
    config = source.checkpoint.config
    kind = float_kind(config, source.recipe)
    pieces = list(CompressedPieces(source, kind))
    rows = served_rows(source.rows, COMPRESSED, kind)
    files, size = write_pieces(out_dir, pieces, rows, progress, shard_bytes)
    found = _quantization(source)
    write_json(out_dir / CONFIG, model_config(config, kind, found))
    write_generation_config(out_dir, source.checkpoint.path, config)
    facts = {"format": COMPRESSED, "float_type": kind, "compression": found["format"] if found else None}
    return Written([*files, CONFIG, GENERATION_CONFIG], size, facts)


def _quantization(source: BuildSource) -> dict[str, Any] | None:
    coded = coded_matrices(source)
    if not coded:
        return None
    plain = [module for module in matrix_precisions(source.checkpoint.config, source.recipe) if module not in coded]
    return quantization_config(next(iter(coded.values())), source.recipe.kv_cache, ["lm_head", *plain])


class CompressedPieces(CodedPieces):
    """The form of compressed-tensors."""

    def _with_cache(self, piece: Piece) -> Piece:
        """The scales of a layer's cache come with the matrix of its keys."""
        if not self._cache_scales or not piece.name.endswith("self_attn.k_proj.weight"):
            return piece
        layer = int(piece.name.split(".")[2])
        return replace(piece, encoder=KvScalesEncoder(piece.encoder, layer, self._cache_scales[layer]))

    def _encoder(self, module: str, shape: tuple[int, int], precision: Precision) -> CompressedEncoder:
        form = compressed_format(precision)
        static = precision.activations.endswith("/tensor")
        scale = input_scale(self.source.input_scales, module) if static else None
        if form in ("float-quantized", "int-quantized"):
            dtype = "I8" if form == "int-quantized" else "F8_E4M3"
            return PlainEncoder(module, shape, dtype, precision.group_size != TENSOR, scale)
        if form == "pack-quantized":
            return PackedEncoder(module, shape, precision.bits, precision.groups(shape[1]), self.kind)
        assert form == "nvfp4-pack-quantized"
        return Nvfp4PackedEncoder(module, shape, self._matrix_scale(module), scale)
