"""Engines beside each other: divergences from kept logits, and the page of `compare`."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.parity import between_engines
from exporter.parity.between_engines import KeptLogits, divergences
from exporter.parity.comparison_page import quality_plot, render_comparison


def kept(folder: Path, name: str, positions: np.ndarray, logits: np.ndarray) -> KeptLogits:
    found = KeptLogits(folder / f"{name}.npy")
    found.keep(positions, logits)
    return found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def test_divergences_over_common_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL in float64 from its definition; blocks of the vocabulary change nothing."""
    monkeypatch.setattr(between_engines, "COLUMNS", 7)
    generator = np.random.default_rng(0)
    first, second = (generator.normal(size=(n, 40)).astype(np.float32) for n in (6, 5))
    engines = {
        "a": kept(tmp_path, "a", np.arange(10, 16), first),
        "b": kept(tmp_path, "b", np.arange(12, 17), second),
        "c": kept(tmp_path, "c", np.arange(90, 92), first[:2]),
    }
    pairs = {(pair["engine"], pair["other"]): pair for pair in divergences(engines)}
    assert len(pairs) == 6
    x, y = log_softmax(first[2:]), log_softmax(second[:4])
    expected = {("a", "b"): (np.exp(x) * (x - y)).sum(-1).mean(), ("b", "a"): (np.exp(y) * (y - x)).sum(-1).mean()}
    for pair, value in expected.items():
        assert pairs[pair]["positions"] == 4
        assert pairs[pair]["kl_divergence_mean"] == pytest.approx(value, rel=1e-9)
        assert pairs[pair]["top1_agreement"] == (x.argmax(-1) == y.argmax(-1)).mean()
    assert pairs["a", "c"]["kl_divergence_mean"] is None and pairs["a", "c"]["positions"] == 0


def row(name: str, divergence: float | None, size: int, **changes: Any) -> dict[str, Any]:
    plain = {
        "engine": f"engines/{name}",
        "target": "tvm",
        "recipe": name,
        "passed": True,
        "held_to_simulation": True,
        "engine_bytes": size,
        "bits_per_weight": 4.5,
        "kl_divergence_mean": divergence,
        "top1_agreement": 0.9,
        "perplexity_engine": 4.0,
        "perplexity_ratio": 1.0,
        "prefill_tokens_per_s": 100.0,
        "decode_tokens_per_s": 10.0,
    }
    return {**plain, **changes}


ROWS = [
    row("int4", 0.03, 5_000_000),
    row("int8<b>", 0.0004, 9_000_000, target="onnxruntime", held_to_simulation=None),
    row("exact", 0.0, 30_000_000),
    row("broken", None, 7_000_000, passed=False, perplexity_engine=None, perplexity_ratio=None, top1_agreement=None),
]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.circles: list[tuple[float, float]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        assert not {"src", "href"} & values.keys() and tag != "script"
        if tag == "circle":
            self.circles.append((float(values["cx"] or 0), float(values["cy"] or 0)))


def test_the_page_is_self_contained_and_escaped() -> None:
    pairs = [{"engine": "engines/int4", "other": "engines/exact", "kl_divergence_mean": 0.02, "top1_agreement": 0.9}]
    page = render_comparison({"engines": ROWS, "pairs": pairs})
    Tags().feed(page)
    assert "int8&lt;b&gt;" in page and "int8<b>" not in page
    assert "failed" in page and "to eager alone" in page and "prefers-color-scheme: dark" in page


def test_smaller_is_left_and_better_is_lower() -> None:
    tags = Tags()
    tags.feed(quality_plot(ROWS))
    assert len(tags.circles) == 3
    worst, middle, best = tags.circles
    assert worst[0] < middle[0] < best[0] and worst[1] < middle[1] < best[1]
    assert quality_plot([ROWS[3]]) == ""
