"""Writing attention: rotate and cache this step's keys and values, then attend over the cache."""

from dataclasses import replace

from targets.tvm.lower.program import Kernel, Tensor
from targets.tvm.lower.slice_lowering import SliceLowering
from targets.tvm.lower.values import Attended


def write_attention(low: SliceLowering, attended: Attended, packed: Tensor) -> Tensor:
    """[T, heads * head_dim] from the packed projection [T, (heads + 2 kv_heads) * head_dim]."""
    query, keys = attended.query, attended.key.heads
    heads, kv_heads, width, kind = query.heads, keys.heads, query.head_dim, low.setting.kv_cache
    assert query.tables is not None
    for table in query.tables:
        if low.shape(table)[1] * 2 != width:
            raise low.refuse(f"{table.name} is {low.shape(table)}, heads are {width} wide")
    config = low.setting.config
    if (kv_heads, width) != (config.num_kv_heads, config.head_dim) or heads % kv_heads:
        raise low.refuse(f"{heads} heads over {kv_heads} of width {width} do not fit the config's cache")
    tables = [low.weight(table) for table in query.tables]
    steps = [low.parameters[name] for name in ("positions", "token_rows")]
    shape = ("T", heads * width)
    rotary = Kernel("rotary_cache", (heads, kv_heads, width, kind, attended.scale))
    for cached in (attended.key, attended.value):
        low.written[replace(cached, live=False)] = low.cache
    (rotated,) = low.call(rotary, [packed, *tables, *steps], [("float32", shape)], written=low.cache)
    kernel = Kernel("attention", (heads, kv_heads, width, kind))
    return low.call(kernel, [rotated, low.parameters["segments"], *low.cache], [("float32", shape)])[0]
