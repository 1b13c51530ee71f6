"""The TensorRT-LLM checkpoint: compiled by trtllm-build, served by the TensorRT backend that 1.2 was the last to have.

Read in: TensorRT-LLM 1.2 tensorrt_llm/commands/build.py, tensorrt_llm/commands/serve.py. Not run.
"""

from exporter.handoff.facts import ServingFacts
from exporter.handoff.route import ENGINE_DIR, Route

ENGINE = f"{ENGINE_DIR}/engine"
READ = "TensorRT-LLM 1.2 (tensorrt_llm/commands/build.py, serve.py)"
NOTES = (
    "Needs TensorRT-LLM 1.2.x or older: later versions have no TensorRT backend. They load what --format hf writes, of "
    "the recipes that it has.",
    "Compile on a GPU of the kind that will serve, into a directory of its own: the artifact's files stay as they are.",
)


def legacy_route(facts: ServingFacts, compiled: bool) -> Route:
    """`compiled`: the artifact holds the engine already (built with --engine)."""
    folder = ENGINE if compiled else "trtllm-engine"
    found = facts.checkpoint
    ranks = found.tensor_parallel * found.pipeline_parallel
    build = [
        *("trtllm-build", "--checkpoint_dir", ENGINE_DIR, "--output_dir", folder),
        *("--max_batch_size", str(facts.max_batch), "--max_seq_len", str(facts.max_seq_len)),
        *("--max_input_len", str(facts.max_seq_len), "--workers", str(ranks)),
    ]
    serve = [
        *("trtllm-serve", folder, "--backend", "tensorrt", "--tokenizer", ENGINE_DIR),
        *(("--tp_size", str(found.tensor_parallel)) if found.tensor_parallel > 1 else ()),
        *(("--pp_size", str(found.pipeline_parallel)) if found.pipeline_parallel > 1 else ()),
        *("--max_batch_size", str(facts.max_batch), "--max_seq_len", str(facts.max_seq_len)),
    ]
    commands = (tuple(serve),) if compiled else (tuple(build), tuple(serve))
    return Route(
        "trtllm-build",
        "TensorRT-LLM 1.2 (TensorRT backend)",
        commands,
        notes=NOTES[: 1 if compiled else 2],
        checked=READ,
    )
