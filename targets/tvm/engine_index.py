"""engine.json: what a runner needs to know of an engine besides its library and weights. docs/targets.md lists it."""

import json
from typing import TYPE_CHECKING

from exporter.core.config import ModelConfig
from targets.base import Limits
from targets.tvm.engine_files import FORMAT
from targets.tvm.isa import Isa
from targets.tvm.kernels.cache_format import BLOCK, value_width
from targets.tvm.weight_file import WeightPlan

if TYPE_CHECKING:
    from targets.tvm.lower.program import LoweredModel, LoweredSlice


def engine_index(
    config: ModelConfig, limits: Limits, isa: Isa, kv_cache: str, chunk: int, model: "LoweredModel", plan: WeightPlan
) -> dict[str, object]:
    """The fields of engine.json. Tensor names list the weights of each VM function in the order it takes them."""

    def names(part: "LoweredSlice") -> list[str]:
        return [plan.names[stored] for stored in part.stored]

    return {
        "format": FORMAT,
        "profile": isa.name,
        "lanes": isa.lanes,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "head_size": config.head_size,
        "max_batch": limits.max_batch,
        "max_seq_len": limits.max_seq_len,
        "chunk": chunk,
        "cache": {"kind": kv_cache, "block": BLOCK, "value_width": value_width(isa, config.head_dim)},
        "tensors": {name: tensor.to_json() for name, tensor in plan.tensors.items()},
        "embedding": names(model.embedding),
        "layers": [names(layer) for layer in model.layers],
        "layer_functions": list(model.layer_functions),
        "head": names(model.head),
    }


def index_text(index: dict[str, object]) -> str:
    """The file's text; the same index gives the same bytes."""
    return json.dumps(index, indent=1) + "\n"
