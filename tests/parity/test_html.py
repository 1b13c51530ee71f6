"""The report page: well formed, complete, self-contained, escaped."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from exporter.parity.html import render_html, write_html
from exporter.parity.report import Check, Divergence, Proof, StageResult, VerifyReport

VOID = {"meta", "br"}


class Strict(HTMLParser):
    """Fails on tags that do not match; collects text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def report(**changes: Any) -> VerifyReport:
    values: dict[str, Any] = {
        "target": "onnxruntime",
        "recipe": "int4-rtn",
        "perplexity_reference": 11.25,
        "perplexity_engine": 11.5,
        "checks": (
            Check("kl_divergence_mean", 0.00412, 0.05),
            Check("perplexity_ratio", 1.022, 1.05),
            Check("top1_agreement", 0.934),
            Check("ragged_batch_vs_single", None, note="the engine is built for one row"),
        ),
        "proof": Proof(True, "onnxruntime 1.31.1", True),
        "stages": (
            StageResult(
                "trace", (Check("local_error", 5e-7, 4e-6, "trace"),), (0.0, 6e-7, 9e-7), (0.0, 5e-7, 3e-7, 1e-7)
            ),
            StageResult("quantize", (), (5e-3, 0.12, 0.15), (0.0, 5e-7, 3e-7, 1e-7)),
        ),
        "positions": 193,
        "facts": {"text": "<script>alert(1)</script>", "prefill_tokens": 256},
    }
    return VerifyReport(**{**values, **changes})


MANIFEST = {
    "files": [{"path": "model.onnx", "bytes": 123456}, {"path": "model.onnx.data", "bytes": 7890123}],
    "weights_bytes": 7800000,
    "coverage": {
        "fraction": 0.98,
        "bits_per_weight": 4.75,
        "tensors": [{"name": "lm_head.weight", "requested": "int4/g32", "actual": "fp32", "why": "odd <width>"}],
    },
}


def parse(text: str) -> Strict:
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_page_is_complete() -> None:
    text = render_html(report(), {"manifest": MANIFEST, "digest": "ab12", "bench": {"decode_tokens_per_s": 41.5}})
    page = parse(text)
    words = " ".join(page.text)
    for expected in ("parity passed", "0.00412", "1.022", "93.4 %", "11.5", "193", "4.75", "7.89 MB", "41.5", "ab12"):
        assert expected in words or expected in text, expected
    for expected in ("odd <width>", "lm_head.weight", "built for one row", "onnxruntime 1.31.1"):
        assert expected in words, expected
    assert page.tags.count("polyline") == 4
    assert {"svg", "details"} <= set(page.tags)


def test_page_loads_nothing_and_runs_nothing() -> None:
    text = render_html(report(), {"manifest": MANIFEST})
    page = parse(text)
    assert page.links == []
    assert "script" not in page.tags
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_an_engine_that_was_not_run_is_not_called_passed() -> None:
    proof = Proof(True, "tvm 0.27", None)
    facts = {"engine_not_run": "the engine was built for <aarch64-linux>"}
    page = render_html(report(proof=proof, facts=facts), {})
    assert "parity of the engine not checked" in page and "&lt;aarch64-linux&gt;" in page
    assert "parity passed" not in page and "parity failed" not in page


def test_failure_names_the_divergence() -> None:
    found = Divergence("fuse", 3, "RotaryEmbedding", 0.7)
    page = parse(render_html(report(first_divergence=found), {}))
    words = " ".join(page.text)
    assert "parity failed" in words
    assert "layer 3, operator RotaryEmbedding" in words


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_values_are_shown(bad: float, tmp_path: Path) -> None:
    stages = (StageResult("fuse", (), (0.0, bad), (0.0, bad, bad)),)
    checks = (Check("kl_divergence_mean", bad, 0.05),)
    path = tmp_path / "report.html"
    write_html(report(checks=checks, stages=stages, perplexity_engine=bad), {}, path)
    text = path.read_text()
    assert "not finite" in " ".join(parse(text).text)
    assert 'cy="nan"' not in text
    assert 'cy="inf"' not in text
