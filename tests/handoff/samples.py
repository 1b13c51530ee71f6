"""Facts of engines and directories of checkpoints, as the hand-off meets them."""

import json
from pathlib import Path
from typing import Any

from exporter.core.task import Task
from exporter.handoff.checkpoint_facts import CheckpointFacts
from exporter.handoff.facts import ServingFacts, Tensor

LABELS = Task("classify", ("safe", "unsafe"), (7, 9))
CACHE = Tensor("float32", ("batch_size", 2, "cache_length", 16))


def facts(target: str = "onnxruntime", **changes: Any) -> ServingFacts:
    fields: dict[str, Any] = {
        "target": target,
        "recipe": "int4-rtn",
        "max_batch": 4,
        "max_seq_len": 256,
        "inputs": {
            "input_ids": Tensor("int64", ("batch_size", "sequence_length")),
            "attention_mask": Tensor("int64", ("batch_size", "total_sequence_length")),
            "past_key_values.0.key": CACHE,
        },
        "outputs": {"logits": Tensor("float32", ("batch_size", 1, 320)), "present.0.key": CACHE},
        "toolchain": {"onnxruntime": "1.31.1"},
        "proof": "Built by a test.",
    }
    return ServingFacts(**{**fields, **changes})


def plan_facts(toolkit: str = "tensorrt", **changes: Any) -> ServingFacts:
    """A classifier of the target tensorrt."""
    inputs = {name: Tensor("int64", ("B", "S")) for name in ("input_ids", "position_ids")}
    fields: dict[str, Any] = {
        "task": LABELS,
        "inputs": {**inputs, "last_rows": Tensor("int64", ("B",))},
        "outputs": {"logits": Tensor("float32", ("B", 2))},
        "gpu": {"toolkit": toolkit, "version": "11.4.0", "compute_capabilities": ["8.9"]},
    }
    return facts("tensorrt", **{**fields, **changes})


def checkpoint_facts(form: str, algorithm: str, **changes: Any) -> ServingFacts:
    """A checkpoint of the target tensorrt-llm."""
    return facts("tensorrt-llm", inputs={}, outputs={}, checkpoint=CheckpointFacts(form, algorithm, **changes))


def write_json(directory: Path, **files: Any) -> Path:
    """`name=value` becomes name.json."""
    directory.mkdir(exist_ok=True)
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory
