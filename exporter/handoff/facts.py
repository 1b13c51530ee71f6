"""What the hand-off files are made from: an engine in the words of those who will serve it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.artifact.manifest import Manifest
from exporter.core.task import GENERATE, Task
from exporter.handoff.checkpoint_facts import NO_CHECKPOINT, CheckpointFacts, checkpoint_facts

CHECKPOINTS = "tensorrt-llm"


@dataclass(frozen=True)
class Tensor:
    """An input or output of the engine: dtype in NumPy's words, shape of numbers and names of free axes."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ServingFacts:
    """One engine. `checkpoint` is filled for checkpoints of the target tensorrt-llm, `gpu` (`requirements["gpu"]` of
    the manifest) for engines that need one. `proof`: what stands behind the engine, one sentence."""

    target: str
    recipe: str
    max_batch: int
    max_seq_len: int
    task: Task = GENERATE
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    checkpoint: CheckpointFacts = NO_CHECKPOINT
    gpu: Mapping[str, Any] = field(default_factory=dict)
    toolchain: Mapping[str, str] = field(default_factory=dict)
    has_chat_template: bool = False
    proof: str = ""


def facts_of(manifest: Manifest, directory: Path) -> ServingFacts:
    """The facts of an engine whose files stand in `directory`, the manifest itself perhaps not yet."""
    signature = manifest.signature
    return ServingFacts(
        target=manifest.target,
        recipe=manifest.recipe_name,
        max_batch=manifest.limits.max_batch,
        max_seq_len=manifest.limits.max_seq_len,
        task=manifest.task,
        inputs=_tensors(signature.get("inputs", {})),
        outputs=_tensors(signature.get("outputs", {})),
        checkpoint=checkpoint_facts(directory) if manifest.target == CHECKPOINTS else NO_CHECKPOINT,
        gpu=manifest.requirements.get("gpu", {}),
        toolchain=manifest.toolchain,
        has_chat_template=(directory / "chat_template.jinja").is_file(),
        proof=_proof(manifest),
    )


def _tensors(signature: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: Tensor(str(entry["dtype"]), tuple(entry["shape"])) for name, entry in signature.items()}


def _proof(manifest: Manifest) -> str:
    """The proof's own words as a sentence; manifests of older versions have none."""
    words = str(manifest.proof.get("statement") or f"built by {manifest.proof.get('built_by')}")
    return f"{words[:1].upper()}{words[1:]}. manifest.json has the figures (`parity`, `proof`)."
