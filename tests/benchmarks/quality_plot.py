"""Quality against size as a picture: one panel for each model of calibration_quality.py.

    python -m tests.benchmarks.quality_plot DIR/quality.csv docs/quality.svg

A line for each method, grouped by its bits per weight of the decoder layers; mean KL to eager on a logarithmic
axis. No external resources; colours follow a light or dark page.
"""

import argparse
import csv
import math
from html import escape
from itertools import groupby
from pathlib import Path

WIDTH, TOP, LINE, BOTTOM = 1000, 50, 17, 34
NAMES, GAP = 176, 24
DECADES = (-3.4, -0.3)
COLOURS = {"enginesmith": "#2563eb", "llm-compressor": "#d97706", "modelopt": "#16a34a", "llama.cpp": "#dc2626"}
MODELS = {"plain": "examples/stdlib-llama", "variant": "the same with outlier channels"}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#334155}.g{stroke:#94a3b8;stroke-opacity:.35}.t{font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#cbd5e1}}"
)
Row = dict[str, str]


def tool_of(method: str) -> str:
    return next((tool for tool in COLOURS if method.startswith(tool)), "enginesmith")


def label_of(method: str) -> str:
    return method.removeprefix(tool_of(method)).replace("actorder static", "").strip()


def bits_of(row: Row) -> float:
    return round(float(row["bits"]), 3)


def axis(panel: int) -> tuple[float, float]:
    """Left and right end of a panel's axis."""
    width = (WIDTH - GAP) / 2
    return panel * (width + GAP) + NAMES, panel * (width + GAP) + width - 8


def place(panel: int, divergence: float) -> float:
    left, right = axis(panel)
    return left + (right - left) * (math.log10(divergence) - DECADES[0]) / (DECADES[1] - DECADES[0])


def grid(panel: int, title: str, bottom: int) -> list[str]:
    parts = [f'<text class="t" x="{axis(panel)[0] - NAMES:.0f}" y="18">{escape(title)}</text>']
    for value in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
        x = place(panel, value)
        parts.append(f'<line class="g" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 12}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP - 17}" text-anchor="middle">{value:g}</text>')
    return parts


def lines(panel: int, rows: list[Row]) -> tuple[list[str], int]:
    """A dot for each method, headings of bits between; and where they end."""
    parts, y, start = list[str](), TOP, axis(panel)[0] - NAMES
    for bits, group in groupby(sorted(rows, key=lambda row: (bits_of(row), -float(row["mean KL"]))), key=bits_of):
        parts.append(f'<text class="t" x="{start:.0f}" y="{y + 4}">{bits:g} bits</text>')
        y += LINE
        for row in group:
            x, colour = place(panel, float(row["mean KL"])), COLOURS[tool_of(row["method"])]
            parts.append(f'<text x="{start + 10:.0f}" y="{y + 4}">{escape(label_of(row["method"]))}</text>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="{colour}"/>')
            y += LINE
    return parts, y


def legend(bottom: int) -> list[str]:
    parts = []
    for index, (tool, colour) in enumerate(COLOURS.items()):
        x = 12 + 150 * index
        parts.append(f'<circle cx="{x}" cy="{bottom + 20}" r="4.5" fill="{colour}"/>')
        parts.append(f'<text x="{x + 10}" y="{bottom + 24}">{escape(tool)}</text>')
    note = "mean KL to eager, nats; less is better"
    return [*parts, f'<text x="{WIDTH - 8}" y="{bottom + 24}" text-anchor="end">{note}</text>']


def shown(row: Row) -> bool:
    divergence = float(row["mean KL"])
    return DECADES[0] < math.log10(divergence) < DECADES[1] and float(row["bits"]) < 9 and "whole" not in row["method"]


def plot(table: list[Row]) -> str:
    """The picture as SVG."""
    body, bottom = list[str](), 0
    for panel, model in enumerate(MODELS):
        drawn, end = lines(panel, [row for row in table if row["model"] == model and shown(row)])
        body, bottom = body + drawn, max(bottom, end)
    grids = [part for panel, title in enumerate(MODELS.values()) for part in grid(panel, title, bottom)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img">'
    parts = [head, "<title>Quality against size</title>", f"<style>{STYLE}</style>"]
    return "".join([*parts, *grids, *body, *legend(bottom), "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    with arguments.table.open(newline="") as file:
        arguments.out.write_text(plot(list(csv.DictReader(file))), encoding="utf-8")


if __name__ == "__main__":
    main()
