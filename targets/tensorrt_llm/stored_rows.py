"""Rows of tensors that are stored as floats."""

from collections.abc import Mapping

import numpy as np

from exporter.core.safetensors_file import TensorInfo, read_rows
from targets.tensorrt_llm.stored_checks import fault, stored_errors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def float_rows(tensors: Mapping[str, TensorInfo], name: str, start: int, stop: int) -> np.ndarray:
    """float32 rows; a tied head is the embedding."""
    if name == HEAD and HEAD not in tensors:
        name = EMBEDDING
    if name not in tensors:
        raise fault("tensor_missing", f"no file holds {name}")
    with stored_errors():
        return read_rows(tensors[name], start, stop).astype(np.float32)
