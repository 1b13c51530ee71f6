"""Writing a TensorRT-LLM checkpoint: config.json and rankN.safetensors, every rank in one pass over the weights.

Each chunk of rows is read and encoded once and its pieces are written where they belong in the files of all ranks, so
memory holds a few chunks whatever the model's size and the number of shards.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np

from exporter.core.canonical import CheckpointWeight
from exporter.core.disk import output_errors
from exporter.core.number_formats import E4M3_MAX
from exporter.core.progress import Progress
from exporter.core.recipe import Precision
from targets.base import BuildSource
from targets.tensorrt_llm.formats import FLOAT_TYPES
from targets.tensorrt_llm.shards import Piece, Shards
from targets.tensorrt_llm.tensor_file import DTYPES, TensorFile
from targets.tensorrt_llm.trtllm_build import LAST_VERSION, build_command
from targets.tensorrt_llm.trtllm_config import (
    FLOAT,
    KV_ALGORITHMS,
    MODULES,
    SMOOTHQUANT,
    SMOOTHQUANT_PLUGIN,
    W4A8_AWQ,
    WEIGHT_ONLY,
    Algorithm,
    algorithm_of,
    config_json,
    model_algorithm,
    module_precision,
)
from targets.tensorrt_llm.trtllm_encode import Encoded, Matrix, shared_scales
from targets.tensorrt_llm.trtllm_tensors import (
    CACHE_SCALES,
    EMBEDDING,
    HEAD,
    LAST_NORM,
    NORMS,
    ONES,
    has_bias,
    layer_prefix,
    rank_tensors,
)
from targets.tensorrt_llm.written import Written

CONFIG = "config.json"
CHUNK_ELEMENTS = 1 << 20
MAX_THREADS = 4
LEAST_FP8_CACHE_SCALE = 1.0
"""modelopt keeps scales of FP8 caches from falling below 1; TensorRT-LLM's own converter writes 1 (llama/convert.py).
E4M3 keeps four bits of any magnitude from 2^-6 on; what that costs smaller keys and values is measured when the files
are read back."""


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def write_trtllm(source: BuildSource, out_dir: Path, progress: Progress) -> Written:
    """Write config.json and the file of each rank into `out_dir`; `shards.check` has said that it can be done.

    Raises InputError (`output.*`, weights that are not finite) and UnsupportedError (values that fp16 cannot hold).
    """
    shards = Shards.of(source.checkpoint.config, source.engine)
    with ExitStack() as stack:
        specs = {rank: rank_tensors(shards, source.recipe, rank) for rank in shards.ranks}
        files = [
            stack.enter_context(TensorFile.create(out_dir / rank_file(rank), specs[rank])) for rank in shards.ranks
        ]
        _Writer(source, shards, files).write(progress)
    config = config_json(source.checkpoint.config, source.recipe, source.engine)
    with output_errors(out_dir / CONFIG):
        (out_dir / CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    return Written(
        [CONFIG, *(rank_file(rank) for rank in shards.ranks)],
        sum(spec.nbytes for rank in shards.ranks for spec in specs[rank]),
        _report(source, shards),
    )


def _report(source: BuildSource, shards: Shards) -> dict[str, object]:
    algorithm = model_algorithm(shards.config, source.recipe)
    report: dict[str, object] = {
        "form": "trtllm",
        "quant_algo": algorithm.name,
        "kv_cache_quant_algo": KV_ALGORITHMS.get(source.recipe.kv_cache),
        "tensor_parallel": shards.tp,
        "pipeline_parallel": shards.pp,
        "compile": build_command("CHECKPOINT", source.limits, source.engine),
        "compile_with": f"tensorrt-llm {LAST_VERSION} or older, on the GPUs that the engines are for",
    }
    if algorithm in WEIGHT_ONLY:
        report["note"] = "weights are floats in the files; trtllm-build rounds them when it loads them"
    return report


@dataclass(frozen=True)
class _Writer:
    source: BuildSource
    shards: Shards
    files: list[TensorFile]
    largest: dict[tuple[str, int], float] = field(default_factory=dict)
    """max|w| of a module of W4A8_AWQ, by its tensors' name and first rank."""
    lock: Lock = field(default_factory=Lock)

    @property
    def kind(self) -> str:
        """The float type of everything that is not quantized."""
        return self.source.recipe.lm_head.kind

    def write(self, progress: Progress) -> None:
        config = self.shards.config
        total = config.parameter_count + config.vocab_size * config.hidden_size * config.tie_word_embeddings
        done = 0
        for job, future in _in_order(self._jobs()):
            future.result()
            done += job.elements
            progress.advance(min(done / total, 1.0), job.name)
        self._write_ones()
        self._write_ranges()

    def _jobs(self) -> Iterator["_Job"]:
        yield from self._tables()
        for layer in range(self.shards.config.num_layers):
            yield from self._layer(layer)

    def _tables(self) -> Iterator["_Job"]:
        """Embedding, last norm and head."""
        last = self.shards.pp - 1
        checkpoint_head = self.source.checkpoint.config.head_source
        for name, tensor, stage in (("model.embed_tokens.weight", EMBEDDING, 0), (checkpoint_head, HEAD, last)):
            pieces = list(self.shards.table_pieces(stage))
            matrix = Matrix(name, Precision(self.kind), FLOAT)
            yield from self._matrix_jobs(matrix, tensor.removesuffix(".weight"), pieces)
            yield _Job(name, partial(self._fill, tensor, pieces))
        yield _Job(LAST_NORM, partial(self._vector, "model.norm.weight", LAST_NORM, self.shards.ranks_of(last)))

    def _fill(self, tensor: str, pieces: list[Piece]) -> None:
        """Zeros in rows beyond the vocabulary."""
        dtype = DTYPES[FLOAT_TYPES[self.kind]]
        for piece in pieces:
            rows = piece.stop - piece.start
            zeros = np.zeros((self.shards.vocabulary - rows, self.shards.config.hidden_size), dtype)
            self.files[piece.rank].write(tensor, rows, zeros)

    def _layer(self, layer: int) -> Iterator["_Job"]:
        prefix, ranks = layer_prefix(self.shards, layer), self.shards.ranks_of(self.shards.place(layer)[0])
        shared = shared_scales(self.source, layer)
        yield _Job(f"layers.{layer}", partial(self._scalars, layer, prefix, ranks))
        for module, names in MODULES.items():
            precision = module_precision(self.source.recipe, layer, module)
            algorithm = algorithm_of(precision)
            assert algorithm is not None
            for name in names:
                pieces = list(self.shards.pieces(layer, name))
                full = f"model.layers.{layer}.{name}"
                matrix = Matrix(f"{full}.weight", precision, algorithm, shared.get(module))
                yield from self._matrix_jobs(matrix, f"{prefix}.{module}", pieces)
                if has_bias(self.shards.config, module):
                    yield _Job(full, partial(self._bias, f"{full}.bias", f"{prefix}.{module}.bias", pieces))

    def _matrix_jobs(self, matrix: Matrix, tensor: str, pieces: list[Piece]) -> Iterator["_Job"]:
        rows, width = self.source.checkpoint.tensors[matrix.name].shape
        step = max(2, CHUNK_ELEMENTS // width // 2 * 2)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            work = partial(self._chunk, matrix, tensor, pieces, start, stop)
            yield _Job(matrix.name, work, (stop - start) * width)

    def _chunk(self, matrix: Matrix, tensor: str, pieces: list[Piece], start: int, stop: int) -> None:
        encoded = matrix.encode(self.source, self.kind, start, stop)
        if matrix.algorithm.name == W4A8_AWQ:
            with self.lock:
                place = (tensor, pieces[0].rank)
                self.largest[place] = max(self.largest.get(place, 0.0), encoded.largest)
        for piece in pieces:
            if encoded.whole is not None and start <= piece.start < stop and piece.row == 0:
                # The first of the matrices that are stored as one: the others have the same scale.
                self.files[piece.rank].write(
                    f"{tensor}.weights_scaling_factor", 0, np.array([encoded.whole], np.float32)
                )
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                part = slice(low - start, high - start)
                self._put(matrix.algorithm, tensor, piece, encoded, part, piece.row + low - piece.start)

    def _put(self, algorithm: Algorithm, tensor: str, piece: Piece, encoded: Encoded, part: slice, row: int) -> None:
        file = self.files[piece.rank]
        packed = 2 if algorithm.weights == "int4" else 1
        block = encoded.block[part.start // packed : part.stop // packed, piece.left : piece.right]
        file.write(f"{tensor}.weight", row // packed, np.ascontiguousarray(block))
        if encoded.scales is None:
            return
        scales = encoded.scales[part]
        if algorithm.group_size:
            left, right = piece.left // algorithm.group_size, piece.right // algorithm.group_size
            file.write(f"{tensor}.weights_scaling_factor", row, np.ascontiguousarray(scales[:, left:right]))
        elif algorithm == SMOOTHQUANT:
            file.write(f"{tensor}.weights_scaling_factor", row, scales[:, 0])
        elif algorithm == SMOOTHQUANT_PLUGIN:
            file.write_columns(f"{tensor}.per_channel_scale", 0, row, np.ascontiguousarray(scales.T))
        else:
            file.write(f"{tensor}.per_channel_scale", row, scales[:, 0])

    def _bias(self, name: str, tensor: str, pieces: list[Piece]) -> None:
        """Biases of matrices cut along columns are whole on every rank: they are added after the shards' sum."""
        rows = max(piece.stop for piece in pieces)
        values = self._floats(name, rows)
        for piece in pieces:
            self.files[piece.rank].write(tensor, piece.row, values[piece.start : piece.stop])

    def _vector(self, name: str, tensor: str, ranks: range) -> None:
        values = self._floats(name, self.shards.config.hidden_size)
        for rank in ranks:
            self.files[rank].write(tensor, 0, values)

    def _floats(self, name: str, length: int) -> np.ndarray:
        values = self.source.rows(CheckpointWeight((name,), Precision(self.kind)), 0, length)
        assert isinstance(values, np.ndarray)
        return values

    def _scalars(self, layer: int, prefix: str, ranks: range) -> None:
        """Norms, and the numbers of which a module or a layer has one."""
        for norm, name in NORMS.items():
            self._vector(f"model.layers.{layer}.{name}.weight", f"{prefix}.{norm}.weight", ranks)
        numbers = {f"{prefix}.{name}": value for name, value in self._numbers(layer)}
        for rank in ranks:
            for name, value in numbers.items():
                self.files[rank].write(name, 0, np.array([value], np.float32))

    def _numbers(self, layer: int) -> Iterator[tuple[str, float]]:
        recipe = self.source.recipe
        for module, names in MODULES.items():
            if module_precision(recipe, layer, module).activations.endswith("/tensor"):
                scales = [self.source.input_scales[f"model.layers.{layer}.{name}"] for name in names]
                yield f"{module}.activation_scaling_factor", max(scales)
        if recipe.kv_cache in KV_ALGORITHMS:
            yield from zip((f"attention.{name}" for name in CACHE_SCALES), self._cache_scales(layer), strict=True)

    def _cache_scales(self, layer: int) -> tuple[float, float, float]:
        scales = self.source.kv_scales
        assert scales is not None, "the target calibrates this cache"
        keys, values = scales[layer]
        if self.source.recipe.kv_cache == "fp8":
            keys, values = max(keys, LEAST_FP8_CACHE_SCALE), max(values, LEAST_FP8_CACHE_SCALE)
        return keys, values, max(keys, values)

    def _write_ones(self) -> None:
        for file in self.files:
            for spec in file.specs:
                if spec.name.endswith(ONES):
                    file.write(spec.name, 0, np.ones(spec.shape, DTYPES[spec.dtype]))

    def _write_ranges(self) -> None:
        """`weights_scaling_factor_2` of W4A8_AWQ: the factor by which its weights come into the range of E4M3."""
        for (tensor, first), largest in self.largest.items():
            scale = np.float32(largest) / np.float32(E4M3_MAX) if largest else np.float32(1)
            for rank in range(first, first + self.shards.tp):
                self.files[rank].write(f"{tensor}.weights_scaling_factor_2", 0, np.array([scale], np.float32))


@dataclass(frozen=True)
class _Job:
    """Something to write, on any thread: `elements` of the weights are done with it."""

    name: str
    run: Callable[[], None]
    elements: int = 0


def _in_order(jobs: Iterator[_Job]) -> Iterator[tuple[_Job, Future[None]]]:
    """Jobs under way on several threads, a few ahead of the one that is waited for."""
    threads = min(len(os.sched_getaffinity(0)), MAX_THREADS)
    with ThreadPoolExecutor(threads, thread_name_prefix="write-shards") as pool:
        pending: deque[tuple[_Job, Future[None]]] = deque()
        try:
            for job in jobs:
                pending.append((job, pool.submit(job.run)))
                if len(pending) > threads:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            for _, future in pending:
                future.cancel()
