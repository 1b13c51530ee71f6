"""The hand-off files of an artifact: serving.json for programs, serving.md for people, Triton's repository."""

import json
from pathlib import Path
from typing import Any

from exporter.artifact.manifest import Manifest
from exporter.handoff.checkpoint_facts import TRTLLM
from exporter.handoff.facts import CHECKPOINTS, ServingFacts, facts_of
from exporter.handoff.legacy_server import legacy_route
from exporter.handoff.llm_servers import checkpoint_routes
from exporter.handoff.own_runtime import runtime_routes
from exporter.handoff.page import serving_page
from exporter.handoff.route import ENGINE_DIR, Route
from exporter.handoff.triton import REPOSITORY, triton_repository
from exporter.handoff.triton_native import FOLDER, native_files, native_section

PAGE, INDEX, FORMAT = "serving.md", "serving.json", 1


def handoff_files(manifest: Manifest, directory: Path) -> dict[str, str]:
    """Path inside the artifact -> text. `directory` holds the engine's files, written before; the manifest is known
    but for the list of files. The same engine gives the same bytes, and no path of this machine is among them."""
    facts = facts_of(manifest, directory)
    found = routes(facts, (directory / "engine").is_dir())
    files = {PAGE: serving_page(facts, found, native_section(facts)), INDEX: _index(facts, found)}
    if facts.target != CHECKPOINTS:
        files |= {f"{REPOSITORY}/{name}": text for name, text in triton_repository(facts).items()}
        files |= {f"{FOLDER}/{name}": text for name, text in native_files(facts).items()}
    return files


def write_handoff(manifest: Manifest, directory: Path) -> None:
    """Write the files into the artifact that is being made. OSError passes through."""
    for name, text in handoff_files(manifest, directory).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def routes(facts: ServingFacts, compiled: bool = False) -> tuple[Route, ...]:
    """Every consumer that an engine of this target is meant for. `compiled`: a TensorRT-LLM engine lies inside."""
    if facts.target != CHECKPOINTS:
        return runtime_routes(facts)
    if facts.checkpoint.form == TRTLLM:
        return (legacy_route(facts, compiled),)
    return checkpoint_routes(facts)


def _index(facts: ServingFacts, found: tuple[Route, ...]) -> str:
    value: dict[str, Any] = {
        "format": FORMAT,
        "engine_directory": ENGINE_DIR,
        "target": facts.target,
        "recipe": facts.recipe,
        "task": facts.task.kind,
        "labels": list(facts.task.labels),
        "limits": {"max_batch": facts.max_batch, "max_seq_len": facts.max_seq_len},
        "routes": [route.to_json() for route in found],
    }
    if facts.checkpoint.form:
        value["checkpoint"] = {"form": facts.checkpoint.form, "algorithm": facts.checkpoint.algorithm or None}
    return json.dumps(value, indent=2) + "\n"
