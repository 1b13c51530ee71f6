"""An engine's graph as ONNX Runtime's CPU kernels can compute it: rewritten in memory, where a type has none."""

from typing import TYPE_CHECKING

from targets.tensorrt.cpu_bf16 import round_in_bf16
from targets.tensorrt.cpu_fp4 import decode_fp4

if TYPE_CHECKING:
    import onnx


def cpu_form(proto: "onnx.ModelProto") -> tuple[str, ...]:
    """Rewrite a graph in place -> what was rewritten, in words; nothing for a graph in float16, whose operators ONNX
    Runtime itself computes in float32 where it has no kernels. Weights outside the file stay there."""
    changes = []
    if decode_fp4(proto):
        changes.append("four-bit floats decoded, and rounded to, in float32")
    if round_in_bf16(proto):
        changes.append("bfloat16 computed in float32 and rounded after every operator, to nearest, ties to even")
    return tuple(changes)
