"""config.pbtxt for Triton's own backends, which run an engine's graph without our runtime: one step a request.

They are kept apart from the repository (a model without its file would keep Triton from starting); the page says what
to copy where. Fields: triton-inference-server/common protobuf/model_config.proto.
"""

from collections.abc import Mapping

from exporter.handoff.facts import ServingFacts, Tensor
from exporter.handoff.pbtxt import Value, Word, write_message
from exporter.handoff.route import ENGINE_DIR

FOLDER, MODEL = "triton-native", "enginesmith_graph"
LABELS = "labels.txt"
TYPES = {
    "bool": "TYPE_BOOL",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
}


def native_files(facts: ServingFacts) -> dict[str, str]:
    """Path below triton-native/ -> text; nothing where no backend of Triton's takes the engine."""
    if facts.target == "onnxruntime" and _expressible(facts):
        text = onnx_config(facts)
    elif is_plan(facts) and facts.task.classifies and _expressible(facts):
        text = plan_config(facts)
    else:
        return {}
    files = {f"{MODEL}/config.pbtxt": text}
    if facts.task.classifies:
        files[f"{MODEL}/{LABELS}"] = "\n".join(facts.task.labels) + "\n"
    return files


def is_plan(facts: ServingFacts) -> bool:
    """Whether the engine is a plan of TensorRT proper; TensorRT-RTX's plans are another format."""
    return facts.target == "tensorrt" and facts.gpu.get("toolkit") == "tensorrt"


def onnx_config(facts: ServingFacts) -> str:
    """Whole shapes, the batch too (max_batch_size 0): caches are inputs and outputs, which Triton cannot batch."""
    fields: dict[str, Value] = {
        "platform": "onnxruntime_onnx",
        "max_batch_size": 0,
        "input": [_tensor(name, tensor, 0) for name, tensor in facts.inputs.items()],
        "output": [_tensor(name, tensor, 0, _labels(facts, name)) for name, tensor in facts.outputs.items()],
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
    }
    return write_message(fields)


def plan_config(facts: ServingFacts) -> str:
    """Rows are batched by Triton where requests have prompts of one length; the only optimization profile is 0."""
    fields: dict[str, Value] = {
        "platform": "tensorrt_plan",
        "max_batch_size": facts.max_batch,
        "input": [_tensor(name, tensor, 1) for name, tensor in facts.inputs.items()],
        "output": [_tensor(name, tensor, 1, _labels(facts, name)) for name, tensor in facts.outputs.items()],
        "instance_group": [{"count": 1, "kind": Word("KIND_GPU")}],
        "dynamic_batching": {},
    }
    return write_message(fields)


def native_section(facts: ServingFacts) -> str:
    """What serving.md says about Triton's own backends."""
    if facts.target not in ("onnxruntime", "tensorrt"):
        return ""
    why = _refusal(facts)
    body = f"{why}: use the python backend above." if why else f"```\n{_copies(facts)}\n```\n\n{_limits(facts)}"
    return f"## Triton's own backends\n\n{body}"


def _refusal(facts: ServingFacts) -> str:
    """Why no backend of Triton's takes the engine; empty where one does."""
    if native_files(facts):
        return ""
    if facts.target == "tensorrt" and not facts.task.classifies:
        return "Its caches must keep their address from step to step, which Triton's TensorRT backend does not do"
    if facts.target == "tensorrt":
        return (
            "This is a plan of TensorRT-RTX, and Triton's TensorRT backend reads those of TensorRT alone (built where "
            "`tensorrt` is installed, it would have a config.pbtxt here)"
        )
    return "Its inputs or outputs have a type that Triton has no name for"


def _copies(facts: ServingFacts) -> str:
    copies = [f"cp -r {ENGINE_DIR}/{FOLDER}/{MODEL} REPOSITORY/", f"mkdir REPOSITORY/{MODEL}/1"]
    if facts.target == "tensorrt":
        copies.append(f"cp {ENGINE_DIR}/engine.plan REPOSITORY/{MODEL}/1/model.plan")
    else:
        copies.append(f"cp {ENGINE_DIR}/model.onnx {ENGINE_DIR}/model.onnx.data REPOSITORY/{MODEL}/1/")
    return "\n".join([*copies, "tritonserver --model-repository=REPOSITORY"])


def _limits(facts: ServingFacts) -> str:
    if facts.target == "tensorrt":
        version = facts.gpu.get("version", "")
        return (
            f"It needs a Triton whose TensorRT is {version} (or a plan built with --version-compatible and "
            "`--backend-config=tensorrt,version-compatible=true`). Token ids go in, right-padded; tokenizing is the "
            "client's."
        )
    version = facts.toolchain.get("onnxruntime", "")
    return (
        "A request is one step: token ids, the mask of all positions so far, and every cache, [rows, heads, positions, "
        "width], as large as the longest answer; `present` is `past_key_values` after the step and goes into the next. "
        "All of it travels with each request, so this is for graphs behind a client of their own; the python backend "
        f"above keeps caches where they are. The engine was built with ONNX Runtime {version}; Triton 26.07 has 1.27."
    )


def _expressible(facts: ServingFacts) -> bool:
    tensors = [*facts.inputs.values(), *facts.outputs.values()]
    return bool(facts.inputs) and all(tensor.dtype in TYPES for tensor in tensors)


def _labels(facts: ServingFacts, output: str) -> dict[str, Value]:
    return {"label_filename": LABELS} if facts.task.classifies and output == "logits" else {}


def _tensor(name: str, tensor: Tensor, batch_axes: int, further: Mapping[str, Value] | None = None) -> dict[str, Value]:
    """The axes after `batch_axes`; names become -1. Triton wants an axis at least: a scalar a row is reshaped."""
    dims = [size if isinstance(size, int) else -1 for size in tensor.shape[batch_axes:]]
    fields: dict[str, Value] = {"name": name, "data_type": Word(TYPES[tensor.dtype]), "dims": dims or [1]}
    if not dims:
        fields["reshape"] = {"shape": []}
    return {**fields, **(further or {})}
