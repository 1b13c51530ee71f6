"""The per-layer error plot of the report, as inline SVG: one line per stage, logarithmic, from rounding to one."""

import math
from collections.abc import Sequence
from html import escape

from exporter.parity.limits import LOCAL_ERROR
from exporter.parity.report import StageResult

WIDTH, HEIGHT = 860, 330
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 42
LOWEST, HIGHEST = -8, 0
"""Decades: float32 rounds at 6e-8; an error of 1 is as large as the signal."""

STAGE_NAMES = {
    "trace": "traced graph",
    "fuse": "fused graph",
    "quantize": "quantized",
    "simulate": "simulation",
    "compile": "engine",
}


def error_plot(stages: Sequence[StageResult]) -> str:
    """SVG and legend; an empty string where no stage has per-layer errors.

    Solid lines: a stage on its own against eager, at each layer boundary. Dashed lines: each slice given its
    reference's input, against what it should make of it.
    """
    shown = [stage for stage in stages if stage.layer_errors or stage.local_errors]
    if not shown:
        return ""
    points = max(max(len(stage.layer_errors), len(stage.local_errors) - 1) for stage in shown)
    body = [*_grid(points)]
    for stage in shown:
        body.append(_line(stage.stage, stage.layer_errors, points, "against eager"))
        body.append(_line(stage.stage, stage.local_errors[:-1], points, "slice alone", local=True))
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="relative error after each layer">{"".join(body)}</svg>'
    )
    return f'<div class="scroll">{svg}</div>{_legend(shown)}'


def _x(index: int, points: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (index / max(1, points - 1))


def _y(error: float) -> float:
    """Zero and anything below the lowest decade sit on the axis; what is not finite, at the top."""
    decade = HIGHEST if not math.isfinite(error) else math.log10(max(error, 10.0**LOWEST))
    share = (min(decade, HIGHEST) - LOWEST) / (HIGHEST - LOWEST)
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def _grid(points: int) -> list[str]:
    parts = []
    for decade in range(LOWEST, HIGHEST + 1):
        y = _y(10.0**decade)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = "1" if decade == 0 else f'10<tspan dy="-4" font-size="8">{decade}</tspan>'
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    limit = _y(LOCAL_ERROR)
    parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{limit:.1f}" y2="{limit:.1f}"/>')
    text = "limit of a lossless slice (narrow model)"
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{limit - 5:.1f}" text-anchor="end">{text}</text>')
    every = max(1, math.ceil(points / 17))
    for index in range(0, points, every):
        label = "embedding" if index == 0 else str(index - 1)
        anchor = "start" if index == 0 else "middle"
        x, y = _x(index, points) - (LEFT - 8 if index == 0 else 0), HEIGHT - BOTTOM + 18
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{label}</text>')
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">after layer</text>')
    return parts


def _line(stage: str, errors: Sequence[float], points: int, what: str, local: bool = False) -> str:
    if not errors:
        return ""
    spots = [(_x(index, points), _y(error), error) for index, error in enumerate(errors)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
    marks = []
    for index, (x, y, error) in enumerate(spots):
        where = "embedding" if index == 0 else f"layer {index - 1}"
        title = escape(f"{STAGE_NAMES.get(stage, stage)}, {what}, {where}: {error:.2g}")
        radius = 4 if not math.isfinite(error) else 2.4
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{title}</title></circle>')
    dash = ' class="local"' if local else ""
    return f'<g class="{escape(stage)}"><polyline{dash} points="{path}"/>{"".join(marks)}</g>'


def _legend(stages: Sequence[StageResult]) -> str:
    entries = []
    for stage in stages:
        name = STAGE_NAMES.get(stage.stage, stage.stage)
        for errors, style, what in (
            (stage.layer_errors, "", "against eager"),
            (stage.local_errors, ' class="dash"', "each slice alone"),
        ):
            if errors:
                entries.append(
                    f'<span class="{escape(stage.stage)}"><i{style}></i><span>{escape(name)}, {what}</span></span>'
                )
    return f'<div class="legend">{"".join(entries)}</div>'
