"""Where each piece of a matrix goes when a checkpoint is cut for several GPUs, and which cuts are possible.

rank = stage * tp + shard. Layers go to the pipeline's stages in order, the first ones taking one more where they do
not divide (`Mapping.pp_layers` in tensorrt_llm/mapping.py). Within a stage q, k, v, gate_proj and up_proj are cut along
their rows (q, k and v by heads; a head of keys and values is repeated where there are more shards than heads), o_proj
and down_proj along their columns, embedding and head along their rows, filled up with zeros to a multiple of tp
(`pad_vocab_size` in tensorrt_llm/_utils.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from exporter.core.config import ModelConfig
from exporter.core.engine_options import EngineOptions
from exporter.core.recipe import Recipe
from exporter.core.support import Support
from targets.tensorrt_llm.trtllm_config import (
    MODULES,
    WEIGHT_ONLY,
    Algorithm,
    left_out,
    model_algorithm,
)

MOST_RANKS = 512
"""All rank files are open at once while a checkpoint is written."""


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) and columns [left, right) of a checkpoint's matrix: in a rank's tensor from `row` on."""

    rank: int
    start: int
    stop: int
    left: int
    right: int
    row: int


@dataclass(frozen=True)
class Shards:
    """A model cut into `tp` shards and `pp` stages; `check` says whether it can be."""

    config: ModelConfig
    tp: int = 1
    pp: int = 1

    @staticmethod
    def of(config: ModelConfig, engine: EngineOptions) -> "Shards":
        return Shards(config, engine.tensor_parallel, engine.pipeline_parallel)

    @property
    def ranks(self) -> range:
        return range(self.tp * self.pp)

    @cached_property
    def stages(self) -> tuple[range, ...]:
        """The layers of each stage."""
        each, more = divmod(self.config.num_layers, self.pp)
        starts = [stage * each + min(stage, more) for stage in range(self.pp + 1)]
        return tuple(range(*pair) for pair in pairwise(starts))

    def place(self, layer: int) -> tuple[int, int]:
        """The stage of a layer, and its number there, from 0."""
        stage = next(stage for stage, layers in enumerate(self.stages) if layer in layers)
        return stage, layer - self.stages[stage].start

    def ranks_of(self, stage: int) -> range:
        return range(stage * self.tp, (stage + 1) * self.tp)

    @property
    def vocabulary(self) -> int:
        """Rows of a shard of embedding and head."""
        return -(-self.config.vocab_size // self.tp)

    def module_shape(self, module: str) -> tuple[int, int]:
        """Rows and columns of `attention.qkv` ... on one rank."""
        names = MODULES[module]
        shapes = [self.config.linear_shapes[name] for name in names]
        if self.by_columns(names[0]):
            return shapes[0][0], shapes[0][1] // self.tp
        return sum(self._local_rows(name) for name in names), shapes[0][1]

    @staticmethod
    def by_columns(name: str) -> bool:
        """Whether a matrix is cut along its columns, so that every shard adds to the whole output."""
        return name in ("self_attn.o_proj", "mlp.down_proj")

    def pieces(self, layer: int, name: str) -> Iterator[Piece]:
        """Where the pieces of `self_attn.q_proj` ... go; a repeated head of keys goes to several ranks."""
        rows, width = self.config.linear_shapes[name]
        for shard, rank in enumerate(self.ranks_of(self.place(layer)[0])):
            if self.by_columns(name):
                step = width // self.tp
                yield Piece(rank, 0, rows, shard * step, (shard + 1) * step, 0)
            else:
                start = self._first_row(name, shard)
                yield Piece(rank, start, start + self._local_rows(name), 0, width, self._offset(name))

    def table_pieces(self, stage: int) -> Iterator[Piece]:
        """Where rows of the embedding (first stage) or the head (last one) go; the rest of a shard is zeros."""
        config, step = self.config, self.vocabulary
        for shard, rank in enumerate(self.ranks_of(stage)):
            start = min(shard * step, config.vocab_size)
            yield Piece(rank, start, min(start + step, config.vocab_size), 0, config.hidden_size, 0)

    def _local_rows(self, name: str) -> int:
        config = self.config
        if name == "self_attn.q_proj":
            return config.num_heads // self.tp * config.head_dim
        if name in ("self_attn.k_proj", "self_attn.v_proj"):
            return max(1, config.num_kv_heads // self.tp) * config.head_dim
        return config.linear_shapes[name][0] // self.tp

    def _first_row(self, name: str, shard: int) -> int:
        if name in ("self_attn.k_proj", "self_attn.v_proj"):
            return shard * self.config.num_kv_heads // self.tp * self.config.head_dim
        return shard * self._local_rows(name)

    def _offset(self, name: str) -> int:
        """First row of a matrix in the tensor it is stacked in."""
        names = next(names for names in MODULES.values() if name in names)
        return sum(self._local_rows(before) for before in names[: names.index(name)])


def check(config: ModelConfig, recipe: Recipe, engine: EngineOptions) -> Support:
    """Whether a model becomes a TensorRT-LLM checkpoint cut like that, told from config and recipe alone; precisions
    and caches by themselves are the business of targets.tensorrt_llm.support."""
    faults = [*_mixture_faults(config, recipe, engine), *_cut_faults(config, recipe, engine)]
    if not faults:
        return Support("native")
    return Support("refused", "; ".join(why for why, _ in faults), faults[0][1])


def _mixture_faults(config: ModelConfig, recipe: Recipe, engine: EngineOptions) -> Iterator[tuple[str, str]]:
    algorithm = model_algorithm(config, recipe)
    floats = bool(left_out(config, recipe))
    if algorithm.name and floats and algorithm.whole:
        yield f"{algorithm.name} replaces whole layers: none of their matrices can stay a float", "use fp8 or int4"
    elif algorithm.name and floats and engine.pipeline_parallel > 1:
        yield (
            "layers are counted from 0 in every stage, so one layer cannot be left out of a stage alone",
            "give all layers one precision, or leave --pp out",
        )
    if algorithm in WEIGHT_ONLY and "gptq" in recipe.algorithms:
        yield (
            f"trtllm-build rounds the weights of {algorithm.name} itself: codes of GPTQ would be lost",
            "use int4 with --group-size 128 (W4A16_AWQ), which keeps them",
        )
    if algorithm.name == "W4A16" and engine.tensor_parallel > 1:
        yield (
            "trtllm-build gives each shard's columns scales of their own when it rounds W4A16: what it makes of int4 "
            "depends on --tp, and cannot be held to the recipe",
            "use int4 with --group-size 128 (W4A16_AWQ), or leave --tp out",
        )
    if config.classifies:
        yield "a TensorRT-LLM checkpoint has a head for the whole vocabulary", "use --format hf, or target tensorrt"


def _cut_faults(config: ModelConfig, recipe: Recipe, engine: EngineOptions) -> Iterator[tuple[str, str]]:
    tp, pp = engine.tensor_parallel, engine.pipeline_parallel
    if tp * pp > MOST_RANKS:
        yield f"--tp {tp} --pp {pp} makes {tp * pp} shards", f"at most {MOST_RANKS} are written"
    if pp > config.num_layers:
        yield f"--pp {pp} of a model with {config.num_layers} layers", f"--pp {config.num_layers} at most"
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % tp:
        yield f"--tp {tp} does not divide {heads} heads", _choices(config, recipe)
    elif kv_heads % tp and tp % kv_heads:
        yield f"--tp {tp} neither divides {kv_heads} heads of keys nor is a multiple", _choices(config, recipe)
    if config.intermediate_size % tp:
        yield f"--tp {tp} does not divide the intermediate size {config.intermediate_size}", _choices(config, recipe)
    if faults := list(_width_faults(config, recipe, tp)):
        yield "; ".join(faults), _choices(config, recipe)


def _width_faults(config: ModelConfig, recipe: Recipe, tp: int) -> Iterator[str]:
    """Every matrix whose kernel would need padding."""
    algorithm = model_algorithm(config, recipe)
    multiple = algorithm.multiple * tp if algorithm.multiple > 1 else 1
    for module, names in MODULES.items():
        rows = _whole_rows(config, names, tp)
        width = config.linear_shapes[names[0]][1]
        if wrong := [f"{what} {size}" for what, size in (("rows", rows), ("width", width)) if size % multiple]:
            yield f"{module}: {' and '.join(wrong)} no multiple of {multiple} ({_why(algorithm, tp)})"


def _why(algorithm: Algorithm, tp: int) -> str:
    return f"{algorithm.name}: {algorithm.multiple}" + (f" for each of {tp} shards" if tp > 1 else "")


def _whole_rows(config: ModelConfig, names: tuple[str, ...], tp: int) -> int:
    """Rows over all shards, repeated heads counted as often as they are stored."""
    repeat = max(1, tp // config.num_kv_heads)
    repeated = ("self_attn.k_proj", "self_attn.v_proj")
    return sum(config.linear_shapes[name][0] * (repeat if name in repeated else 1) for name in names)


def _choices(config: ModelConfig, recipe: Recipe) -> str:
    """The numbers of shards that are possible."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    fitting = [
        str(tp)
        for tp in range(1, min(heads, MOST_RANKS) + 1)
        if not heads % tp
        and (not kv_heads % tp or not tp % kv_heads)
        and not config.intermediate_size % tp
        and not any(_width_faults(config, recipe, tp))
    ]
    return f"possible here: --tp {', '.join(fitting)}" if fitting else "use a recipe without groups, such as fp8"
