"""Building: weights are written while the graph is lowered, then the graph and onnxruntime-genai's configuration."""

from pathlib import Path

import onnx_ir as ir

from exporter.core.config import ModelConfig
from exporter.core.disk import output_errors
from exporter.core.progress import Progress
from targets.base import BuildResult, BuildSource
from targets.onnxruntime.file_names import DATA, GENAI, MODEL
from targets.onnxruntime.genai_config import genai_config
from targets.onnxruntime.kv_cache import KvCache, kv_cache
from targets.onnxruntime.lower import lower
from targets.onnxruntime.weight_file import WeightFile


def build_engine(source: BuildSource, out_dir: Path, progress: Progress, versions: dict[str, str]) -> BuildResult:
    """Write model.onnx, model.onnx.data and genai_config.json; the same source gives the same bytes.

    A classifier has no genai_config.json: onnxruntime-genai generates, and takes every logit for a token's.
    """
    cache = kv_cache(source)
    with WeightFile(out_dir / DATA, source.checkpoint, source.rows) as weights:
        model = lower(source.model, source.config, cache, weights, progress)
    serialized = ir.to_proto(model).SerializeToString(deterministic=True)
    others = {} if source.config.classifies else {GENAI: genai_config(source.config, source.limits, MODEL)}
    with output_errors(out_dir / MODEL):
        (out_dir / MODEL).write_bytes(serialized)
        for name, text in others.items():
            (out_dir / name).write_text(text, encoding="utf-8")
    progress.advance(1.0, "written")
    return BuildResult(
        files=[MODEL, DATA, *others],
        toolchain=versions,
        signature=signature(source.config, cache),
        weights_bytes=weights.weights_bytes,
    )


def signature(config: ModelConfig, cache: KvCache) -> dict[str, dict[str, dict[str, object]]]:
    """Names, types and shapes of the engine's inputs and outputs; letters stand for what a run chooses."""

    def tensor(dtype: str, *shape: int | str) -> dict[str, object]:
        return {"dtype": dtype, "shape": list(shape)}

    stored = tensor(cache.type_name, "batch", config.num_kv_heads, "cache", config.head_dim)
    layers = [f"{index}.{which}" for index in range(config.num_layers) for which in ("key", "value")]
    return {
        "inputs": {
            "input_ids": tensor("int64", "batch", "sequence"),
            "attention_mask": tensor("int64", "batch", "total_sequence"),
            **{f"past_key_values.{name}": stored for name in layers},
        },
        "outputs": {
            "logits": tensor("float32", "batch", 1, config.head_size),
            **{f"present.{name}": stored for name in layers},
        },
    }
