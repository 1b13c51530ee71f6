"""The kernel factories by name, and one function for each kernel that a model needs."""

from collections.abc import Callable

from tvm import tirx

from targets.tvm.isa import Isa
from targets.tvm.kernels.attention import attention
from targets.tvm.kernels.embedding import embedding_float, embedding_int
from targets.tvm.kernels.linear_float import linear_float
from targets.tvm.kernels.linear_int import linear_int
from targets.tvm.kernels.norm import norm
from targets.tvm.kernels.quantize import norm_quantize, quantize
from targets.tvm.kernels.rotary_cache import rotary_cache

Factory = Callable[..., tirx.PrimFunc]

FACTORIES: dict[str, Factory] = {
    factory.__name__: factory
    for factory in (
        attention,
        embedding_float,
        embedding_int,
        linear_float,
        linear_int,
        norm,
        norm_quantize,
        quantize,
        rotary_cache,
    )
}


def generate(isa: Isa, name: str, factory: str, arguments: tuple[object, ...]) -> tirx.PrimFunc:
    """The kernel `name` of a factory; KeyError for a factory that does not exist."""
    return FACTORIES[factory](isa, name, *arguments)
