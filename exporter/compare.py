"""Engines of one checkpoint beside each other: size, quality against the eager model, speed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter.artifact.load import open_artifact
from exporter.core.progress import NoProgress
from exporter.runtime.bench import bench_to_fit
from exporter.verification import verify_engine_directory

COLUMNS = (
    ("engine", "engine", "{}"),
    ("recipe", "recipe", "{}"),
    ("engine_bytes", "MB", "{:.1f}"),
    ("bits_per_weight", "bits/w", "{:.2f}"),
    ("kl_divergence_mean", "KL", "{:.5f}"),
    ("top1_agreement", "top-1", "{:.3f}"),
    ("perplexity_engine", "perplexity", "{:.3f}"),
    ("prefill_tokens_per_s", "prefill t/s", "{:.0f}"),
    ("decode_tokens_per_s", "decode t/s", "{:.1f}"),
)


def compare_engines(
    engines: Sequence[Path], against: Path, text: Path | None = None, threads: int = 0
) -> list[dict[str, Any]]:
    """One row per engine, in the order given. An engine that misses its gate is listed with `passed` false.

    Raises what `verify` raises for a damaged artifact or another checkpoint's engine.
    """
    return [_row(engine, against, text, threads) for engine in engines]


def _row(engine: Path, against: Path, text: Path | None, threads: int) -> dict[str, Any]:
    artifact = open_artifact(engine)
    manifest = artifact.manifest
    report = verify_engine_directory(artifact, against, text, threads, NoProgress()).to_json()
    values = {check["name"]: check["value"] for check in report["checks"]}
    speed = bench_to_fit(artifact, threads)
    names = ("kl_divergence_mean", "kl_divergence_max", "top1_agreement", "perplexity_ratio", "relative_l2_error")
    return {
        "engine": str(engine),
        "target": manifest.target,
        "recipe": report["recipe"],
        "passed": report["passed"],
        "engine_bytes": manifest.total_bytes,
        "bits_per_weight": manifest.bits_per_weight,
        "perplexity_reference": report["perplexity_reference"],
        "perplexity_engine": report["perplexity_engine"],
        **{name: values.get(name) for name in names},
        "prefill_tokens_per_s": speed["prefill_tokens_per_s"],
        "decode_tokens_per_s": speed["decode_tokens_per_s"],
    }


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table for people."""
    table = [[title for _, title, _ in COLUMNS]]
    for row in rows:
        cells = {**row, "engine": Path(row["engine"]).name, "engine_bytes": row["engine_bytes"] / 1e6}
        table.append(["-" if cells[key] is None else form.format(cells[key]) for key, _, form in COLUMNS])
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
