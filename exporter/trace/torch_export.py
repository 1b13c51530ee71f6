"""Tracing with torch.export and torch's exporter on top of it (the default tracer)."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch

from exporter.core.config import ModelConfig
from exporter.trace.lower_program import lower_program
from exporter.trace.model import LlamaWithBoundaries, build_model, example_inputs, llama_config

# torchlib is written in opset 18; any other version would pass through a converter first.
TORCHLIB_OPSET = 18


def export_whole(config: ModelConfig, layers: int) -> ir.Model:
    """The raw graph of a Llama with `layers` layers: inputs, outputs and weights as `LlamaWithBoundaries` has them."""
    module = LlamaWithBoundaries(build_model(llama_config(config, layers), config.head_size))
    dynamic = torch.export.Dim.DYNAMIC
    shapes = (
        {0: dynamic, 1: dynamic},
        {0: dynamic, 1: dynamic},
        {0: dynamic, 2: dynamic, 3: dynamic},
        None,
        tuple({0: dynamic, 2: dynamic} for _ in range(2 * layers)),
    )
    with quiet(), torch.no_grad():
        program = torch.export.export(module, example_inputs(config, layers), dynamic_shapes=shapes, strict=False)
        lower_program(program)
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=TORCHLIB_OPSET, optimize=False, verbose=False, external_data=False
        )
    assert exported is not None
    return exported.model


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's warnings about itself (missing torchvision, deprecations) out of the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
