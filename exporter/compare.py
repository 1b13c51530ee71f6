"""Engines of one checkpoint beside each other: size, quality against the eager model and each other, speed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from exporter.artifact.load import Artifact, open_artifact
from exporter.core.errors import InputError
from exporter.core.progress import NoProgress
from exporter.runtime.bench import bench_to_fit
from exporter.verification import verify_engine_directory

if TYPE_CHECKING:
    from exporter.parity.between_engines import KeptLogits

COLUMNS = (
    ("engine", "engine", "{}"),
    ("target", "target", "{}"),
    ("recipe", "recipe", "{}"),
    ("engine_bytes", "MB", "{:.1f}"),
    ("bits_per_weight", "bits/w", "{:.2f}"),
    ("kl_divergence_mean", "KL", "{:.5f}"),
    ("top1_agreement", "top-1", "{:.3f}"),
    ("perplexity_engine", "perplexity", "{:.3f}"),
    ("perplexity_ratio", "/ eager", "{:.4f}"),
    ("prefill_tokens_per_s", "prefill t/s", "{:.0f}"),
    ("decode_tokens_per_s", "decode t/s", "{:.1f}"),
)


@dataclass(frozen=True)
class Comparison:
    """`engines`: one object for each, in the order given; `pairs`: mean KL(engine, other) in nats, and how often both
    say the same most likely token, for every ordered pair, over the positions that both were run at."""

    engines: tuple[dict[str, Any], ...]
    pairs: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"engines": list(self.engines), "pairs": list(self.pairs)}

    def describe(self) -> str:
        """Tables for people."""
        table = aligned([[title for _, title, _ in COLUMNS], *map(shown_cells, self.engines)])
        return f"{table}\n\n{self._between()}" if self.pairs else table

    def _between(self) -> str:
        """KL of each engine in a row from each in a column."""
        names = [row["engine"] for row in self.engines]
        found = {(pair["engine"], pair["other"]): pair["kl_divergence_mean"] for pair in self.pairs}
        rows = [["KL from", *(Path(name).name for name in names)]]
        for name in names:
            cells = ["-" if (value := found.get((name, other))) is None else f"{value:.5f}" for other in names]
            rows.append([Path(name).name, *cells])
        return aligned(rows)


def compare_engines(engines: Sequence[Path], against: Path, text: Path | None = None, threads: int = 0) -> Comparison:
    """Measure each engine. One that misses its gate is listed with `passed` false.

    Raises what `verify` raises for a damaged artifact or another checkpoint's engine, and InputError for engines of
    different tasks: their logits have nothing in common.
    """
    from exporter.parity.between_engines import KeptLogits, divergences

    opened = [(str(engine), open_artifact(engine)) for engine in engines]
    _check_tasks(dict(opened))
    with TemporaryDirectory(prefix="enginesmith-compare-") as folder:
        kept = [KeptLogits(Path(folder, f"{index}.npy")) for index in range(len(engines))]
        rows = tuple(_row(*one, against, text, threads, into) for one, into in zip(opened, kept, strict=True))
        names = [row["engine"] for row in rows]
        return Comparison(rows, tuple(divergences(dict(zip(names, kept, strict=True)))))


def _check_tasks(engines: Mapping[str, Artifact]) -> None:
    tasks = {name: artifact.manifest.task for name, artifact in engines.items()}
    if len(set(tasks.values())) > 1:
        found = "; ".join(f"{name}: {task.describe()}" for name, task in tasks.items())
        raise InputError("compare.task", f"the engines have different tasks: {found}", "compare engines of one task")


def _row(
    engine: str, artifact: Artifact, against: Path, text: Path | None, threads: int, kept: "KeptLogits"
) -> dict[str, Any]:
    found = verify_engine_directory(artifact, against, text, threads, NoProgress(), seen=kept.keep)
    report = found.to_json()
    values = {check["name"]: check["value"] for check in report["checks"]}
    names = ("kl_divergence_mean", "kl_divergence_max", "top1_agreement", "perplexity_ratio", "relative_l2_error")
    return {
        "engine": engine,
        **_facts(artifact),
        "passed": report["passed"],
        "held_to_simulation": report["proof"]["simulation"],
        "perplexity_reference": report["perplexity_reference"],
        "perplexity_engine": report["perplexity_engine"],
        **{name: values.get(name) for name in names},
        # Of a classifier: how often both name the same label.
        "top1_agreement": values.get("label_agreement", values.get("top1_agreement")),
        **_speed(artifact, threads),
    }


def _facts(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "target": manifest.target,
        "recipe": manifest.recipe_name,
        "engine_bytes": manifest.total_bytes,
        "bits_per_weight": manifest.bits_per_weight,
    }


def _speed(artifact: Artifact, threads: int) -> dict[str, float | None]:
    speed = bench_to_fit(artifact, threads)
    return {name: speed[name] for name in ("prefill_tokens_per_s", "decode_tokens_per_s")}


def shown_cells(row: dict[str, Any]) -> list[str]:
    """One engine's cells in the order of COLUMNS."""
    cells = {**row, "engine": Path(row["engine"]).name, "engine_bytes": row["engine_bytes"] / 1e6}
    return ["-" if cells[key] is None else form.format(cells[key]) for key, _, form in COLUMNS]


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Rows of cells with columns of equal width."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join(line.rstrip() for line in lines)
