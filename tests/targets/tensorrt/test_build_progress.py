"""Nested phases as one fraction; what a report raises stops the build and is kept."""

import pytest

from targets.tensorrt.build_progress import BuildProgress


def test_a_phase_fills_a_step_of_its_parent() -> None:
    told: list[tuple[float, str]] = []
    progress = BuildProgress(lambda fraction, detail: told.append((fraction, detail)))
    progress.begin("Building", None, 4)
    progress.begin("Cloning", "Building", 2)
    assert progress.step("Cloning", 0) and progress.step("Cloning", 1)
    progress.end("Cloning")
    progress.step("Building", 0)
    progress.begin("Optimizing", "Building", 10)
    progress.begin("Fusing", "Optimizing", 2)
    progress.step("Fusing", 0)
    progress.step("Building", 3)
    assert [fraction for fraction, _ in told] == pytest.approx([0.125, 0.25, 0.2625, 1.0])
    assert told[0][1] == "Cloning" and told[-1][1] == "Building"


def test_the_fraction_never_falls() -> None:
    told: list[float] = []
    progress = BuildProgress(lambda fraction, detail: told.append(fraction))
    progress.begin("A", None, 2)
    progress.step("A", 0)
    progress.begin("B", None, 10)
    progress.step("B", 0)
    progress.step("unknown", 3)
    assert told == [0.5]


def test_a_report_that_raises_stops_the_build() -> None:
    def report(fraction: float, detail: str) -> None:
        raise KeyboardInterrupt

    progress = BuildProgress(report)
    progress.begin("A", None, 2)
    assert progress.step("A", 0) is False and progress.step("A", 1) is False
    assert isinstance(progress.error, KeyboardInterrupt)
