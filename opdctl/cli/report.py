"""Write a run as one HTML file: stages, claims, scores, learning curves. No script, no network."""

from __future__ import annotations

import html
import time
from pathlib import Path

from opdctl.evidence.accuracy import accuracies
from opdctl.evidence.judge import judge
from opdctl.evidence.measured import stage_facts
from opdctl.evidence.verdict import WORDS, format_estimate, measured_lines
from opdctl.run.rundir import RunDir, read_rows, write_text
from opdctl.run.status import status

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .25em .8em; border-bottom: 1px solid #ddd;
text-align: left; vertical-align: top; font-variant-numeric: tabular-nums }
.holds, .done { color: #14713d } .refuted, .failed { color: #b3261e }
.undecided, .interrupted, .stale { color: #8a6100 }
figure { display: inline-block; margin: 0 1em 1em 0 } figcaption { font-size: .85em }
svg { background: #fafafa; border: 1px solid #ddd }
"""
CURVES = ("loss", "reward", "entropy", "length", "nll", "guessed", "overlap", "entropy_gap")


def write(run: RunDir, claims: list[dict] | None = None, at_end: bool = False) -> Path:
    """Write ``report.html`` into a run directory, or one for a set of seeds. Return its path.

    Args:
        claims: the records of ``judge``, where they are known already.
        at_end: see ``status``.

    Raises:
        UsageError: not a run directory.
    """
    state = status(run, at_end)
    word, now = _e(state["state"]), time.strftime("%Y-%m-%d %H:%M:%S %z")
    about = f"{_e(state['run'])}: <span class={word}>{word}</span>, as of {now}"
    body = [f"<h1>{_e(state['recipe'])}</h1><p>{about}</p>"]
    claims = judge(run) if claims is None else claims
    if claims:
        body.append("<h2>Claims</h2>" + _claims(claims))
    scores = accuracies(run)
    if scores:
        body.append(_accuracies(scores, len(run.runs())))
    several = len(state.get("runs", [])) > 1
    for run_state in state.get("runs", [state]):
        body.append(_run(RunDir(run_state["run"]), run_state, of_its_own=several))
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_e(state['recipe'])}</title>"
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>"
    )
    path = run / "report.html"
    write_text(path, page)
    return path


def _run(run: RunDir, state: dict, of_its_own: bool) -> str:
    """Return the part of one seed; its accuracies too, where others are beside it."""
    rows = [
        [n, s["kind"], s["status"], f"{s['step']}/{s['total']}", f"{s['seconds']:.1f}"]
        for n, s in state["stages"].items()
    ]
    parts = [
        f"<h2>Stages, seed {state['seed']}</h2>",
        _table(["stage", "kind", "status", "step", "seconds"], rows),
    ]
    if of_its_own and (scores := accuracies(run)):
        parts.append(_accuracies(scores, 1))
    for name, facts in stage_facts(run).items():
        parts.append(_table([name, "measured"], [[k, f"{v:.4g}"] for k, v in facts.items()]))
    parts.append("<h2>Learning curves</h2>")
    for name in state["stages"]:
        parts.append(_curves(name, read_rows(run.stage(name) / "metrics.jsonl")))
    return "".join(parts)


def _accuracies(scores: dict, seeds: int) -> str:
    domains = list(dict.fromkeys(d for row in scores.values() for d in row))
    rows = [
        [m, *(format_estimate(row[d][0], row[d][1:]) if d in row else "" for d in domains)]
        for m, row in scores.items()
    ]
    over = f", mean of {seeds} seeds" if seeds > 1 else ""
    title = f"<h2>Accuracy on held-out prompts{over} [95 % interval]</h2>"
    return title + _table(["model", *domains], rows)


def _claims(claims: list[dict]) -> str:
    rows = []
    for c in claims:
        word = WORDS[c["holds"]]
        rows.append(
            [
                _e(c["name"]),
                f"<span class={word}>{word}</span>",
                _e(c["statement"]),
                _e(c["threshold"]),
                _e(c["reported"]),
                "<br>".join(map(_e, measured_lines(c))),
                _e(c["source"]),
            ]
        )
    heads = ["claim", "verdict", "statement", "threshold", "reported", "measured [95 %]", "source"]
    return _table(heads, rows, raw=True)


def _curves(stage: str, rows: list[dict]) -> str:
    series = {
        k: [(r["step"], r[k]) for r in rows if isinstance(r.get(k), int | float)] for k in CURVES
    }
    for row in rows:
        for domain, value in (row.get("kl") or {}).items():
            series.setdefault(f"kl {domain}", []).append((row["step"], value))
    return "".join(_figure(stage, k, points) for k, points in series.items() if len(points) > 1)


def _figure(stage: str, name: str, points: list[tuple[int, float]]) -> str:
    values = [v for _, v in points]
    low, high = min(values), max(values)
    span, last = (high - low) or 1.0, points[-1][0] or 1
    path = " ".join(f"{4 + 192 * s / last:.1f},{76 - 72 * (v - low) / span:.1f}" for s, v in points)
    return (
        f"<figure><svg width=200 height=80 role=img aria-label='{_e(stage)} {_e(name)}'>"
        f"<polyline fill=none stroke=#2458a6 points='{path}'/></svg>"
        f"<figcaption>{_e(stage)}: {_e(name)} {values[0]:.3g} to {values[-1]:.3g}"
        f"</figcaption></figure>"
    )


def _table(columns: list[str], rows: list[list], raw: bool = False) -> str:
    head = "".join(f"<th>{_e(c)}</th>" for c in columns)
    body = ""
    for row in rows:
        cells = ""
        for value in row:
            text = str(value) if raw else _e(value)
            kind = text if text in ("done", "failed", "interrupted", "stale") else ""
            cells += f"<td class='{kind}'>{text}</td>"
        body += f"<tr>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _e(value) -> str:
    return html.escape(str(value))
