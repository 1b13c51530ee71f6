"""Tracing with TorchScript: torch's older exporter, faster and independent of torch.export."""

import io

import onnx
import onnx_ir as ir
import torch

from exporter.core.config import ModelConfig
from exporter.trace.model import LlamaWithBoundaries, build_model, example_inputs, llama_config
from exporter.trace.torch_export import TORCHLIB_OPSET, quiet


def export_whole(config: ModelConfig, layers: int) -> ir.Model:
    """The raw graph of a Llama with `layers` layers: inputs, outputs and weights as `LlamaWithBoundaries` has them.

    Tracing runs on the meta device, so neither weights nor activations exist.
    """
    module = LlamaWithBoundaries(build_model(llama_config(config, layers), config.head_size))
    past = [f"past_{i}" for i in range(2 * layers)]
    axes = {
        "input_ids": {0: "B", 1: "S"},
        "position_ids": {0: "B", 1: "S"},
        "mask": {0: "B", 2: "S", 3: "T"},
        **{name: {0: "B", 2: "P"} for name in past},
    }
    buffer = io.BytesIO()
    with quiet(), torch.no_grad():
        torch.onnx.export(
            module,
            example_inputs(config, layers),
            buffer,  # type: ignore[arg-type]  # the annotation forgets what the TorchScript exporter accepts
            dynamo=False,
            opset_version=TORCHLIB_OPSET,
            input_names=["input_ids", "position_ids", "mask", "inv_freq", *past],
            dynamic_axes=axes,
            export_params=False,
            keep_initializers_as_inputs=True,
            do_constant_folding=False,
        )
    return ir.from_proto(onnx.load_from_string(buffer.getvalue()))
