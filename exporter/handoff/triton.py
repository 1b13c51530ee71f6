"""A Triton model repository over our own runtime: Triton's python backend, one model, two ways to answer.

`config.pbtxt` answers every request once and runs requests together; `configs/streaming.pbtxt`, chosen with
`--model-config-name=streaming`, sends text as it comes. Fields: triton-inference-server/common
protobuf/model_config.proto; the names text_input and text_output are those of the generate extension
(server docs/protocol/extension_generate.md).
"""

from collections.abc import Mapping

from exporter.handoff.facts import ServingFacts
from exporter.handoff.pbtxt import Value, Word, write_message

MODEL = "enginesmith"
REPOSITORY = "triton"
STRING, INT64, INT32, FP32 = (Word(f"TYPE_{name}") for name in ("STRING", "INT64", "INT32", "FP32"))
DEFAULT_NEW_TOKENS = 128
# How long a request may wait for others to run with.
QUEUE_MICROSECONDS = 500

MODEL_PY = '''"""Triton loads this file; the model itself is part of enginesmith, which must be installed beside it."""

from exporter.handoff.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def triton_repository(facts: ServingFacts) -> dict[str, str]:
    """Path below the repository -> text, for an engine that our runtime runs."""
    files = {f"{MODEL}/config.pbtxt": config(facts), f"{MODEL}/1/model.py": MODEL_PY}
    if not facts.task.classifies:
        files[f"{MODEL}/configs/streaming.pbtxt"] = config(facts, streaming=True)
    return files


def config(facts: ServingFacts, streaming: bool = False) -> str:
    """config.pbtxt. Without `name`, Triton takes the directory's, so that it may be renamed."""
    fields: dict[str, Value] = {
        "backend": "python",
        "max_batch_size": facts.max_batch,
        "input": _classify_inputs() if facts.task.classifies else _generate_inputs(),
        "output": _classify_outputs(facts) if facts.task.classifies else _generate_outputs(),
        "instance_group": [{"count": 1, "kind": Word("KIND_GPU" if facts.gpu else "KIND_CPU")}],
        "parameters": [_parameter(name, value) for name, value in _parameters(facts).items()],
    }
    if streaming:
        fields["model_transaction_policy"] = {"decoupled": True}
    else:
        fields["dynamic_batching"] = {"max_queue_delay_microseconds": QUEUE_MICROSECONDS}
    return write_message(fields)


def _parameters(facts: ServingFacts) -> dict[str, str]:
    """`engine` is relative to the model's directory; `digest`, if given, is what `load` must find; `threads` 0: all."""
    common = {"engine": "../..", "digest": "", "threads": "0", "rows": str(facts.max_batch)}
    return common if facts.task.classifies else {**common, "max_new_tokens": str(DEFAULT_NEW_TOKENS)}


def _parameter(name: str, value: str) -> Mapping[str, Value]:
    return {"key": name, "value": {"string_value": value}}


def _tensor(name: str, dtype: Word, dims: list[int], optional: bool = False) -> dict[str, Value]:
    tensor: dict[str, Value] = {"name": name, "data_type": dtype, "dims": dims}
    return {**tensor, "optional": True} if optional else tensor


def _generate_inputs() -> list[dict[str, Value]]:
    options = (("max_new_tokens", INT32), ("temperature", FP32), ("top_p", FP32), ("seed", INT64))
    return [_tensor("text_input", STRING, [1]), *(_tensor(name, dtype, [1], True) for name, dtype in options)]


def _generate_outputs() -> list[dict[str, Value]]:
    """output_ids is padded with -1 where the rows of a request differ."""
    return [
        _tensor("text_output", STRING, [1]),
        _tensor("output_ids", INT64, [-1]),
        _tensor("finish_reason", STRING, [1]),
    ]


def _classify_inputs() -> list[dict[str, Value]]:
    return [_tensor("text_input", STRING, [1])]


def _classify_outputs(facts: ServingFacts) -> list[dict[str, Value]]:
    """probabilities in the order of the engine's labels."""
    return [_tensor("label", STRING, [1]), _tensor("probabilities", FP32, [len(facts.task.labels)])]
