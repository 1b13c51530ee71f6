"""The engine's graph under construction: standard operators, and ONNX Runtime's own."""

from targets.onnx_graph import OPSETS, OnnxGraph
from targets.onnx_graph import Dimensions as Dimensions

MICROSOFT = "com.microsoft"


class EngineGraph(OnnxGraph):
    """A graph that may have operators of ONNX Runtime."""

    def __init__(self) -> None:
        super().__init__({**OPSETS, MICROSOFT: 1})
