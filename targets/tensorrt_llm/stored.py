"""Which of the three forms a directory holds, and its reader."""

from pathlib import Path

from exporter.core.config import ModelConfig
from exporter.core.recipe import Recipe
from targets.base import StoredModel
from targets.tensorrt_llm.stored_checks import read_object

CONFIG = "config.json"
COMPRESSED_METHOD = "compressed-tensors"


def open_stored(directory: Path, config: ModelConfig, recipe: Recipe) -> StoredModel:
    """The checkpoint of an artifact, to be read back. Raises ArtifactError `stored.*`."""
    found = read_object(directory, CONFIG)
    if "architecture" in found and "architectures" not in found:
        from targets.tensorrt_llm.trtllm_reader import open_trtllm

        return open_trtllm(directory, config, recipe)
    quantization = found.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == COMPRESSED_METHOD:
        from targets.tensorrt_llm.compressed_reader import open_compressed

        return open_compressed(directory, config, recipe)
    from targets.tensorrt_llm.hf_reader import open_hf

    return open_hf(directory, config, recipe)
