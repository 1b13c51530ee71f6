"""The tensors that VM functions take besides weights: a step's tokens and segments, the stream, the cache."""

from exporter.core.config import ModelConfig
from targets.tvm.isa import Isa
from targets.tvm.kernels.cache_format import BLOCK, cache_kind, value_width
from targets.tvm.lower.program import Tensor

IDS = Tensor("ids", "int32", ("T",))
POSITIONS = Tensor("positions", "int32", ("T",))
TOKEN_ROWS = Tensor("token_rows", "int32", ("T",))
SEGMENTS = Tensor("segments", "int32", ("R", 4))
OUT_ROWS = Tensor("out_rows", "int32", ("Q",))


def hidden(config: ModelConfig) -> Tensor:
    """The residual stream."""
    return Tensor("hidden", "float32", ("T", config.hidden_size))


def logits(config: ModelConfig) -> Tensor:
    return Tensor("logits", "float32", ("Q", config.head_size))


def cache_tensors(config: ModelConfig, kind: str, isa: Isa) -> tuple[Tensor, ...]:
    """key, value and, for int8, key_scale and value_scale of one layer."""
    heads, width, stored = config.num_kv_heads, config.head_dim, cache_kind(kind)
    key = Tensor("key", stored.dtype, ("B", heads, "C", width, BLOCK))
    value = Tensor("value", stored.dtype, ("B", heads, "S", value_width(isa, width)))
    if not stored.scaled:
        return key, value
    scales = (Tensor(f"{name}_scale", "float32", ("B", heads, "S")) for name in ("key", "value"))
    return key, value, *scales


def parameters(kind: str, config: ModelConfig) -> tuple[Tensor, ...]:
    """What the VM function of a kind of slice takes before its cache and weights."""
    stream = hidden(config)
    if kind == "embedding":
        return IDS, stream
    if kind == "layer":
        return stream, POSITIONS, TOKEN_ROWS, SEGMENTS
    return stream, OUT_ROWS, logits(config)
