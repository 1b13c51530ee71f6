"""How progress is shown: a live line for people, plain lines for logs, JSON lines for pipelines."""

import json
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from exporter.core.errors import InputError
from exporter.core.progress import NoProgress, Progress

STYLES = ("auto", "plain", "jsonl", "none")
BAR_WIDTH = 24
MIN_INTERVAL = {"live": 0.1, "plain": 5.0, "jsonl": 0.5}


class Display:
    """Turns stage events into lines. `shares` maps each stage to its expected share of the whole time.

    The remaining time is elapsed * (1 - done) / done over the weighted stages: a forecast that
    corrects itself, not a promise.
    """

    def __init__(self, shares: Mapping[str, float], style: str, stream: TextIO | None = None) -> None:
        self.shares = dict(shares)
        self.style = style
        self.stream = stream or sys.stderr
        self.begun = time.monotonic()
        self.shown = -1e9
        self.done: list[str] = []
        self.stage = ""
        self.fraction = 0.0
        self.detail = ""
        self.drawn = False

    def begin(self, stage: str) -> None:
        self.stage, self.fraction, self.detail = stage, 0.0, ""
        self._show(force=True)

    def advance(self, fraction: float, detail: str = "") -> None:
        self.fraction, self.detail = max(0.0, min(fraction, 1.0)), detail
        self._show(force=False)

    def end(self) -> None:
        self.fraction, self.detail = 1.0, ""
        self._show(force=True)
        self.done.append(self.stage)

    def close(self) -> None:
        """Leave the terminal clean."""
        if self.drawn:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self.drawn = False

    def overall(self) -> float:
        """Fraction of the whole job, weighted by the stages' shares."""
        total = sum(self.shares.values()) or 1.0
        now = 0.0 if self.stage in self.done else self.shares.get(self.stage, 0.0) * self.fraction
        return min(1.0, (sum(self.shares.get(s, 0.0) for s in self.done) + now) / total)

    def state(self) -> dict[str, object]:
        """What a line says, as the JSON lines show it."""
        elapsed, overall = time.monotonic() - self.begun, self.overall()
        known = overall > 0.01
        return {
            "stage": self.stage,
            "stage_fraction": round(self.fraction, 4),
            "fraction": round(overall, 4),
            "elapsed_seconds": round(elapsed, 2),
            "remaining_seconds": round(elapsed * (1 - overall) / overall, 1) if known else None,
            "detail": self.detail,
        }

    def _show(self, force: bool) -> None:
        now = time.monotonic()
        if not force and now - self.shown < MIN_INTERVAL[self.style]:
            return
        self.shown = now
        state = self.state()
        if self.style == "jsonl":
            self._write(json.dumps({"event": "progress", **state}) + "\n")
        elif self.style == "plain":
            self._write(f"{_describe(state)}\n")
        else:
            filled = round(BAR_WIDTH * self.overall())
            self._write(f"\r\x1b[K{'█' * filled}{'░' * (BAR_WIDTH - filled)} {_describe(state)}")
            self.drawn = True

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            self.stream = open("/dev/null", "w")  # noqa: PTH123, SIM115  the reader left; the work goes on


def _describe(state: Mapping[str, object]) -> str:
    overall, part = state["fraction"], state["stage_fraction"]
    assert isinstance(overall, float) and isinstance(part, float)
    remaining = state["remaining_seconds"]
    left = f", about {_clock(remaining)} left" if isinstance(remaining, float) and overall < 1 else ""
    detail = f" {state['detail']}" if state["detail"] else ""
    return f"{overall:4.0%} {state['stage']} {part:.0%}{detail} ({_clock(state['elapsed_seconds'])}{left})"


def _clock(seconds: object) -> str:
    assert isinstance(seconds, int | float)
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def make_progress(style: str, shares: Mapping[str, float]) -> Progress:
    """The display for `--progress STYLE`; `auto` is live on a terminal and plain elsewhere."""
    if style not in STYLES:
        raise InputError("usage.progress", f"unknown progress style {style!r}", f"use one of {', '.join(STYLES)}")
    if style == "none":
        return NoProgress()
    if style == "auto":
        style = "live" if sys.stderr.isatty() else "plain"
    return Display(shares, style)


def close(progress: Progress) -> None:
    """End a live line, if there is one."""
    if isinstance(progress, Display):
        progress.close()
