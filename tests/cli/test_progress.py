"""Progress displays: what pipelines read must be JSON, and the forecast must follow the work."""

import io
import json

import pytest

from exporter.cli.progress import Display, make_progress
from exporter.core.errors import InputError
from exporter.core.progress import NoProgress, stage

SHARES = {"trace": 1.0, "compile": 3.0}


def test_json_lines_tell_stage_fraction_elapsed_and_remaining() -> None:
    stream = io.StringIO()
    display = Display(SHARES, "jsonl", stream)
    with stage(display, "trace"):
        pass
    with stage(display, "compile"):
        display.shown = 0.0
        display.advance(0.5, "layer 3")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["progress"] * len(lines)
    half = next(line for line in lines if line["detail"] == "layer 3")
    assert half["stage"] == "compile"
    assert half["fraction"] == pytest.approx((1 + 1.5) / 4)
    assert half["remaining_seconds"] == pytest.approx(half["elapsed_seconds"] * 0.6, abs=0.1)
    assert lines[-1]["fraction"] == 1.0


def test_fraction_never_goes_back_and_unknown_stages_count_nothing() -> None:
    display = Display(SHARES, "plain", io.StringIO())
    seen = []
    for name in ("check", "trace", "compile"):
        display.begin(name)
        for part in (0.0, 0.7, 1.4):
            display.advance(part)
            seen.append(display.overall())
        display.end()
        seen.append(display.overall())
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_live_line_is_removed_at_the_end() -> None:
    stream = io.StringIO()
    display = Display(SHARES, "live", stream)
    display.begin("trace")
    assert "trace" in stream.getvalue() and "\n" not in stream.getvalue()
    display.close()
    assert stream.getvalue().endswith("\r\x1b[K")


def test_a_reader_that_left_does_not_stop_the_work() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    display = Display(SHARES, "jsonl", Closed())
    display.begin("trace")
    display.end()
    assert display.overall() == 0.25


def test_styles() -> None:
    assert isinstance(make_progress("none", SHARES), NoProgress)
    with pytest.raises(InputError, match="unknown progress style 'loud'"):
        make_progress("loud", SHARES)
