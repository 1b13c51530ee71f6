"""serving.md: the routes for people."""

from collections.abc import Sequence

from exporter.handoff.facts import ServingFacts
from exporter.handoff.route import ENGINE_DIR, Route, shell


def serving_page(facts: ServingFacts, routes: Sequence[Route], native: str) -> str:
    """`native`: a section about Triton's own backends, or nothing."""
    refused = [route for route in routes if not route.open]
    parts = [
        f"# Serving this engine\n\n{_summary(facts)}",
        facts.proof,
        f"`{ENGINE_DIR}` is the directory of this file.",
        *(_section(route) for route in routes if route.open),
        *([native] if native else []),
    ]
    if refused:
        parts.append("## Who does not take it\n\n" + "\n".join(f"- {route.title}: {route.why}." for route in refused))
    return "\n\n".join(parts) + "\n"


def _summary(facts: ServingFacts) -> str:
    labels = f", telling apart {', '.join(facts.task.labels)}" if facts.task.classifies else ""
    found = facts.checkpoint
    form = f", form {found.form}, {found.algorithm or 'not quantized'}" if found.form else ""
    ranks = found.tensor_parallel * found.pipeline_parallel
    cut = f", {ranks} ranks" if ranks > 1 else ""
    rows = f"Up to {facts.max_batch} rows of {facts.max_seq_len} positions, prompt and answer together."
    return f"Target {facts.target}, recipe {facts.recipe}{form}{cut}{labels}. {rows}"


def _section(route: Route) -> str:
    parts = [f"## {route.title}"]
    if route.commands:
        parts.append("```\n" + "\n".join(shell(command) for command in route.commands) + "\n```")
    if route.python:
        parts.append(f"```python\n{route.python}```")
    parts.extend(route.notes)
    if route.checked:
        parts.append(f"Written from the sources of {route.checked}; not run where this engine was built.")
    return "\n\n".join(parts)
