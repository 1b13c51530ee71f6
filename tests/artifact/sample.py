"""A small artifact with every kind of file: an ONNX model with external data, a large file, a subdirectory."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from exporter.artifact.manifest import Manifest, PrecisionTable, Source, TensorPrecision, write_manifest
from exporter.core.config import ModelConfig, parse_config
from exporter.core.machine import triple
from exporter.core.recipe import Precision, Recipe
from targets.base import Limits

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
    "pad_token_id": None,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def config(**changes: object) -> ModelConfig:
    return parse_config({**CONFIG, **changes})


def manifest(**changes: object) -> Manifest:
    """A manifest without files; `changes` replace fields."""
    int4 = Precision("int4", 32)
    fields: dict[str, object] = {
        "enginesmith": "0.1.0",
        "source": Source("ab" * 32, config()),
        "recipe": Recipe("int4-rtn", int4, int4, Precision("int8", 32)),
        "coverage": PrecisionTable(1.0, 4.5, (TensorPrecision("lm_head.weight", "int4/g32", "int4/g32"),)),
        "target": "onnxruntime",
        "triple": triple(),
        "requirements": {"cpu_features": []},
        "toolchain": {"onnxruntime": "1.31.1"},
        "signature": {"inputs": {"input_ids": {"dtype": "int64", "shape": ["B", "S"]}}, "outputs": {}},
        "limits": Limits(2, 64),
        "weights_bytes": 4096,
        "parity": {"passed": True, "checks": [{"name": "kl_divergence_mean", "value": 1e-3, "limit": 0.05}]},
        "proof": {"graph_parity": True, "built_by": "onnxruntime 1.31.1", "engine_run": True},
    }
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


def external_tensor(location: str, name: str = "w", **entries: str) -> onnx.TensorProto:
    """A float tensor [4] whose bytes lie at `location`."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def onnx_model(*tensors: onnx.TensorProto, nodes: list[onnx.NodeProto] | None = None) -> bytes:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy")
    graph = helper.make_graph(
        nodes if nodes is not None else [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [x],
        [y],
        initializer=list(tensors),
    )
    return helper.make_model(graph).SerializeToString()


def write_files(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    data = np.random.default_rng(0).bytes(256)
    (directory / "model.onnx.data").write_bytes(data)
    tensor = external_tensor("model.onnx.data", offset="16", length="16")
    (directory / "model.onnx").write_bytes(onnx_model(tensor))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "empty.txt").write_bytes(b"")
    (directory / "extra").mkdir(exist_ok=True)
    (directory / "extra" / "notes.txt").write_text("notes")


def write_artifact(directory: Path, **changes: object) -> Path:
    """A complete artifact in a new directory."""
    write_files(directory)
    write_manifest(directory, manifest(**changes))
    return directory


def reseal(directory: Path, **changes: object) -> None:
    """Write the manifest anew, as whoever tampers with files can do."""
    (directory / "manifest.json").unlink()
    write_manifest(directory, manifest(**changes))
