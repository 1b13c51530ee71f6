"""The verification as one self-contained HTML page for people: verdict, parity, plot, sizes, speed, coverage, proof."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from exporter.parity.html_plot import STAGE_NAMES, error_plot
from exporter.parity.report import Check, VerifyReport

Cells = Sequence[str]

NOT_RUN = "of the engine not checked"
CHECK_WORDS = {
    "relative_l2_error": "Logits against eager, relative L2",
    "kl_divergence_mean": "KL divergence from eager, mean (nats)",
    "kl_divergence_max": "KL divergence from eager, largest (nats)",
    "perplexity_ratio": "Perplexity, engine / eager",
    "top1_agreement": "Same most likely token",
    "label_agreement": "Same label",
    "simulation_relative_l2_error": "Every slice against its simulated quantization",
    "decode_vs_prefill": "Decoded token by token, against all at once",
    "long_position": "Last positions of a full cache",
    "rounding_flips": "Rounding flips in the simulation, taken off",
    "instrumented_vs_plain": "Engine with and without shown hidden states",
    "chunked_vs_prefill": "Prompt in chunks, against one prefill",
    "prefix_reuse": "Continued from a kept prefix",
    "ragged_batch_vs_single": "Batch of unequal rows, against each alone",
    "local_error": "Every slice alone, relative L2",
    "hidden_error": "Hidden states against eager, relative L2",
}


def write_html(report: VerifyReport, extra: Mapping[str, Any], path: Path) -> None:
    """Write the page. `extra` may hold `manifest` (its JSON object), `digest`, and `bench` (the bench object).

    Everything is escaped; the page loads nothing and runs no script. Raises OSError.
    """
    path.write_text(render_html(report, extra), encoding="utf-8")


def render_html(report: VerifyReport, extra: Mapping[str, Any]) -> str:
    """The page as text."""
    manifest: Mapping[str, Any] = extra.get("manifest") or {}
    body = [
        _verdict(report, manifest),
        section("Parity", _parity(report)),
        section("Error after each layer", error_plot(report.stages)),
        section("Recipe", _recipe(manifest)),
        section("Size", _sizes(manifest)),
        section("Speed", _speed(extra.get("bench") or {})),
        section("What was proven", _proof(report, extra)),
        _folded("Checks of the graphs, stage by stage", _stages(report)),
        _coverage(manifest),
    ]
    page = Template(files("exporter.parity").joinpath("page.html").read_text(encoding="utf-8"))
    title = f"{report.recipe} on {report.target}: parity {_word(report)}"
    return page.substitute(title=escape(title), body="\n".join(part for part in body if part))


def _word(report: VerifyReport) -> str:
    if report.passed:
        return "passed"
    return NOT_RUN if report.nothing_failed and report.facts.get("engine_not_run") else "failed"


def _verdict(report: VerifyReport, manifest: Mapping[str, Any]) -> str:
    word, style = _word(report), "good" if report.passed else "bad"
    if report.first_divergence:
        found = report.first_divergence
        sentence = f"The first divergence is in {found.describe()}."
        sentence += f" {found.note[:1].upper()}{found.note[1:]}." if found.note else ""
    elif report.passed:
        sentence = "The engine computes what the checkpoint's own model computes, within the limits of its recipe."
    elif word == NOT_RUN:
        sentence = f"The graphs are the model. The engine itself was not run: {report.facts['engine_not_run']}."
    else:
        sentence = "A check failed; no single layer is to blame."
    figures = _figures(report, manifest)
    return (
        f'<header><span class="verdict {style}">parity {word}</span>'
        f"<h1>{escape(report.recipe)} on {escape(report.target)}</h1><p>{escape(sentence)}</p>"
        f'<div class="figures">{figures}</div></header>'
    )


def _figures(report: VerifyReport, manifest: Mapping[str, Any]) -> str:
    checks = {check.name: check.value for check in report.checks}
    found = [
        (number(report.perplexity_engine), "perplexity of the engine"),
        (number(report.perplexity_reference), "perplexity of eager"),
        (number(checks.get("kl_divergence_mean")), "mean KL, nats"),
        (percent(checks.get("top1_agreement")), "same top token"),
        (str(report.positions) if report.positions else "", "positions compared"),
        (number((manifest.get("coverage") or {}).get("bits_per_weight")), "bits per weight"),
    ]
    return "".join(f"<div><b>{value}</b><span class='quiet'>{name}</span></div>" for value, name in found if value)


def _parity(report: VerifyReport) -> str:
    rows = [_check_row(check) for check in report.checks]
    return table(("check", "measured>", "limit>", "share of the limit", ""), rows)


def _check_row(check: Check) -> Cells:
    value = "not run" if check.value is None else number(check.value) or "not finite"
    limit = "reported" if check.limit is None else number(check.limit)
    words = escape(CHECK_WORDS.get(check.name, check.name))
    note = f'<br><span class="quiet">{escape(check.note)}</span>' if check.note else ""
    verdict = '<span class="good">within</span>' if check.passed else '<span class="bad">over</span>'
    shown = verdict if check.limit is not None or not check.passed else ""
    return (f"{words}<br><code class='quiet'>{escape(check.name)}</code>{note}", value, limit, _meter(check), shown)


def _meter(check: Check) -> str:
    """A bar of how much of the limit is used; perplexity ratios count from 1."""
    if check.limit is None or check.value is None:
        return ""
    base = 1.0 if check.name == "perplexity_ratio" else 0.0
    share = (check.value - base) / (check.limit - base) if math.isfinite(check.value) else 1.0
    style = "good" if check.passed else "bad"
    return f'<div class="meter {style}"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></div>'


def _stages(report: VerifyReport) -> str:
    rows = []
    for stage in report.stages:
        if stage.stage == "compile":
            continue  # its checks are those of the parity table
        for check in stage.checks:
            row = _check_row(check)
            rows.append((escape(STAGE_NAMES.get(stage.stage, stage.stage)), *row[:3], row[4]))
    return table(("stage", "check", "measured>", "limit>", ""), rows)


def _sizes(manifest: Mapping[str, Any]) -> str:
    rows = [(f"<code>{escape(str(file['path']))}</code>", size(file["bytes"])) for file in manifest.get("files", [])]
    if not rows:
        return ""
    total = sum(file["bytes"] for file in manifest["files"])
    rows.append(("<b>together</b>", f"<b>{size(total)}</b>"))
    if "weights_bytes" in manifest:
        rows.append(("of which weights", size(manifest["weights_bytes"])))
    return table(("file", "size>"), rows)


def _recipe(manifest: Mapping[str, Any]) -> str:
    """What was asked, and what calibration it took."""
    recipe, record = manifest.get("recipe") or {}, manifest.get("calibration")
    rows = [("precisions", escape(str(recipe.get("description", ""))))] if recipe else []
    if record:
        rows.append(("quantization parameters", f"<code>{escape(str(record['qparams']))}</code>"))
        rows.append(("algorithms", escape(", ".join(record["algorithms"]) or "statistics alone")))
        shown = ", ".join(f"{count} {name}" for name, count in record["transforms"].items())
        rows.append(("transforms", escape(shown or "none")))
        rows.append(("text", _text(record["text"])))
    return table(("", ""), rows)


def _text(text: Mapping[str, Any] | None) -> str:
    if text is None:
        return "none needed"
    amount = f"{text['tokens']:,} tokens in {text['sequences']:,} sequences of {text['length']}, seed {text['seed']}"
    return f"{escape(amount)}<br><code>{escape(str(text['text_sha256']))}</code>"


def _speed(bench: Mapping[str, Any]) -> str:
    return table(("figure", "measured>"), [(escape(str(k)), escape(_plain(v))) for k, v in bench.items()])


def _proof(report: VerifyReport, extra: Mapping[str, Any]) -> str:
    graphs = {
        True: "The graphs after every stage of the build were run and equal the eager model to rounding.",
        False: "The graphs of the build were run, and one of them is not the model.",
        None: "The graphs of the build were not run here: this is a check of the finished engine alone.",
    }[report.proof.graph_parity]
    engine = {
        True: f"The engine itself was run ({escape(report.proof.built_by)}).",
        False: "The engine could not be run.",
        None: "The engine was not run. That never counts as passed.",
    }[report.proof.engine_run]
    facts = report.facts
    measured = ""
    if facts:
        measured = (
            f"Measured on text ({escape(str(facts.get('text', '')))}): {_amounts(facts)}, rows of "
            f"{facts.get('ragged_lengths')} tokens, and one row that fills all {facts.get('longest_row')} positions."
        )
    simulation = ""
    if report.unsimulated:
        simulation = (
            "It was held to eager alone: the checks against the simulation of its quantization need its file of "
            "quantization parameters and were not run. That never counts as passed."
        )
    digest = f"Digest <code>{escape(str(extra['digest']))}</code>" if extra.get("digest") else ""
    return "".join(f"<p>{part}</p>" for part in (graphs, engine, simulation, measured, digest) if part)


def _amounts(facts: Mapping[str, Any]) -> str:
    if "prompts" in facts:
        return f"{facts['prompts']} prompts of up to {facts.get('longest_prompt')} tokens"
    return f"a prefill of {facts.get('prefill_tokens')} tokens, {facts.get('decode_steps')} decode steps"


def _coverage(manifest: Mapping[str, Any]) -> str:
    coverage = manifest.get("coverage") or {}
    rows = [
        (f"<code>{escape(str(t['name']))}</code>", *(escape(str(t[key])) for key in ("requested", "actual", "why")))
        for t in coverage.get("tensors", [])
    ]
    if not rows:
        return ""
    covered = percent(coverage.get("fraction"))
    rows_shown = table(("tensor", "asked", "stored", "why not"), rows)
    return _folded(f"Precision of every tensor ({covered} as asked)", rows_shown)


def _folded(title: str, content: str) -> str:
    if not content:
        return ""
    return f"<section><details><summary>{escape(title)}</summary>{content}</details></section>"


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def table(columns: Cells, rows: Sequence[Cells]) -> str:
    """`columns` that end in > hold numbers. Cells are HTML already."""
    if not rows:
        return ""
    style = [' class="n"' if column.endswith(">") else "" for column in columns]
    head = "".join(f"<th{s}>{escape(c.rstrip('>'))}</th>" for s, c in zip(style, columns, strict=True))
    lines = ["".join(f"<td{s}>{cell}</td>" for s, cell in zip(style, row, strict=True)) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def number(value: float | None) -> str:
    """A few significant digits; empty where there is no finite number."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.5g}" if 1e-4 <= abs(value) < 1e5 else f"{value:.2e}" if value else "0"


def percent(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e4 else f"{count:,} bytes"


def _plain(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
