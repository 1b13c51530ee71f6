"""The page of `enginesmith compare`: engines in a table, and a plot of quality against size."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from exporter.parity.html import number, percent, section, size, table

Row = Mapping[str, Any]

WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 18, 44
LEAST = 1e-9
"""KL below this is rounding; drawn here."""
LABEL_HEIGHT, LABEL_WIDTH = 13, 6.2
COLORS = ("trace", "fuse", "quantize", "compile")
"""Classes of page.html, one for each target in turn."""


def render_comparison(found: Mapping[str, Any]) -> str:
    """The page as text; `found` is the JSON object of `compare`. Everything is escaped; the page loads nothing."""
    engines: Sequence[Row] = found["engines"]
    body = [
        "<header><h1>Engines beside each other</h1>"
        "<p>Quality is measured against the checkpoint's own model, eager and in float32, on the same text.</p>"
        "</header>",
        section("Quality against size", quality_plot(engines)),
        section("Engines", _engines(engines)),
        section("Against each other", _pairs(found)),
    ]
    page = Template(files("exporter.parity").joinpath("page.html").read_text(encoding="utf-8"))
    return page.substitute(title="Engines beside each other", body="\n".join(part for part in body if part))


def quality_plot(engines: Sequence[Row]) -> str:
    """SVG: mean KL to eager, logarithmic, over megabytes; one mark an engine, one color a target. Empty where no engine
    has a finite KL."""
    shown = [row for row in engines if row["kl_divergence_mean"] is not None]
    if not shown:
        return ""
    scale = _Scale.around(shown)
    targets = list(dict.fromkeys(str(row["target"]) for row in shown))
    body = [*scale.grid(), *_marks(shown, scale, targets)]
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="KL over size">{"".join(body)}</svg>'
    legend = "".join(
        f'<span class="{_color(name, targets)}"><i></i><span>{escape(name)}</span></span>' for name in targets
    )
    return f'<div class="scroll">{svg}</div><div class="legend">{legend}</div>'


class _Scale:
    """Megabytes to x, linear from zero; KL to y, logarithmic between whole decades, less being better and lower."""

    def __init__(self, largest: float, decades: tuple[int, int]) -> None:
        self.largest, self.decades = largest, decades

    @staticmethod
    def around(rows: Sequence[Row]) -> "_Scale":
        values = [math.log10(max(row["kl_divergence_mean"], LEAST)) for row in rows]
        low, high = math.floor(min(values)), math.ceil(max(values))
        return _Scale(max(row["engine_bytes"] for row in rows) * 1.05 / 1e6, (low, max(high, low + 1)))

    def x(self, row: Row) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * row["engine_bytes"] / 1e6 / self.largest

    def y(self, divergence: float) -> float:
        low, high = self.decades
        share = (math.log10(max(divergence, LEAST)) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def grid(self) -> list[str]:
        parts = []
        for decade in range(self.decades[0], self.decades[1] + 1):
            y = self.y(10.0**decade)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            label = f'10<tspan dy="-4" font-size="8">{decade}</tspan>'
            parts.append(f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        step = _round_step(self.largest / 6)
        for index in range(int(self.largest / step) + 1):
            x = LEFT + (WIDTH - LEFT - RIGHT) * index * step / self.largest
            text = f"{index * step:g}"
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{text}</text>')
        middle = (WIDTH + LEFT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">size of the engine, MB</text>')
        parts.append(f'<text x="{LEFT}" y="{TOP - 6}">mean KL to eager, nats</text>')
        return parts


def _round_step(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)


def _marks(rows: Sequence[Row], scale: _Scale, targets: Sequence[str]) -> list[str]:
    """Circles with their recipes beside them; a label that would lie on another one moves down."""
    parts, taken = [], list[tuple[float, float, float]]()
    for row in sorted(rows, key=lambda row: -row["kl_divergence_mean"]):
        x, y, name = scale.x(row), scale.y(row["kl_divergence_mean"]), str(row["recipe"])
        wide, left = len(name) * LABEL_WIDTH, x + 8
        if left + wide > WIDTH - RIGHT:
            left = x - 8 - wide
        down = y + 4
        while any(
            abs(down - other) < LABEL_HEIGHT and left < end and begin < left + wide for begin, end, other in taken
        ):
            down += LABEL_HEIGHT
        taken.append((left, left + wide, down))
        title = escape(f"{Path(row['engine']).name}: {name} on {row['target']}, KL {row['kl_divergence_mean']:.2g}")
        mark = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{title}</title></circle>'
        label = f'<text x="{left:.1f}" y="{down:.1f}">{escape(name)}</text>'
        parts.append(f'<g class="{_color(str(row["target"]), targets)}">{mark}{label}</g>')
    return parts


def _color(target: str, targets: Sequence[str]) -> str:
    return COLORS[targets.index(target) % len(COLORS)]


def _engines(engines: Sequence[Row]) -> str:
    columns = (
        *("engine", "target", "recipe", "size>", "bits per weight>", "KL>", "same top token>"),
        *("perplexity>", "/ eager>", "prefill t/s>", "decode t/s>", "parity"),
    )
    return table(columns, [_engine(row) for row in engines])


def _engine(row: Row) -> tuple[str, ...]:
    return (
        *(escape(text) for text in (Path(row["engine"]).name, str(row["target"]), str(row["recipe"]))),
        size(row["engine_bytes"]),
        f"{row['bits_per_weight']:.2f}",
        number(row["kl_divergence_mean"]),
        percent(row["top1_agreement"]),
        number(row["perplexity_engine"]),
        number(row["perplexity_ratio"]),
        *(_rate(row[name]) for name in ("prefill_tokens_per_s", "decode_tokens_per_s")),
        _verdict(row),
    )


def _rate(value: float | None) -> str:
    """Empty for a classifier's decoding."""
    return "" if value is None else f"{value:,.1f}"


def _verdict(row: Row) -> str:
    if not row["passed"]:
        return '<span class="bad">failed</span>'
    alone = "" if row["held_to_simulation"] else ', <span class="quiet">to eager alone</span>'
    return f'<span class="good">passed</span>{alone}'


def _pairs(found: Mapping[str, Any]) -> str:
    """KL of each engine in a row from each in a column."""
    names = [str(row["engine"]) for row in found["engines"]]
    values = {(pair["engine"], pair["other"]): pair["kl_divergence_mean"] for pair in found["pairs"]}
    if not values:
        return ""
    short = [escape(Path(name).name) for name in names]
    rows = [
        (label, *(number(values.get((name, other))) for other in names))
        for label, name in zip(short, names, strict=True)
    ]
    return table(("KL from", *(f"{name}>" for name in short)), rows)
