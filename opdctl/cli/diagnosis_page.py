"""Write a diagnosis as one HTML page: verdicts, and figures in SVG. No script, no network.

opdctl diagnose --student DIR --teacher DIR --data prompts.jsonl --plot diagnosis.html
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from opdctl.cli.diagnosis_tables import SIGNALS
from opdctl.cli.report import STYLE
from opdctl.errors import UsageError
from opdctl.run.rundir import write_text

WIDE, HIGH, LEFT, LOW, TOP = 400, 210, 40, 32, 10  # of a figure; left and below for its axes
COLOURS = ("#2458a6", "#c2571a", "#14713d", "#8a2be2")
MORE = """
.verdict { font-size: 1.3em; font-weight: 600 } .go { color: #14713d } .stop { color: #b3261e }
.wait { color: #8a6100 } code { background: #f3f3f3; padding: .1em .3em; overflow-wrap: anywhere }
text { font: 11px system-ui, sans-serif; fill: #444 }
"""


def write(stages: list[dict], path: Path) -> Path:
    """Write the page. Return its path.

    Args:
        stages: the entries of ``opdctl diagnose --json``.

    Raises:
        UsageError: the file cannot be written.
    """
    body = "".join(
        _teacher(stage, name, entry)
        for stage in stages
        for name, entry in stage["teachers"].items()
    )
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>opdctl diagnose</title>"
        f"<style>{STYLE}{MORE}</style><body><h1>Will this student learn from this teacher?</h1>"
        f"{body or '<p>Nothing was measured: the checks stages errors.</p>'}</body></html>"
    )
    try:
        write_text(path, page)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "--plot FILE") from None
    return path


def _teacher(stage: dict, name: str, entry: dict) -> str:
    advice = entry["recommendation"]
    kind = {"go": "go", "nothing_to_learn": "stop", "another_teacher": "stop"}
    reasons = "".join(f"<li>{escape(r)}</li>" for r in advice["reasons"])
    do = "".join(f"<p>do: <code>{escape(line)}</code></p>" for line in advice["do"])
    head = f"{escape(stage['stage'])}: teacher {escape(name)}"
    about = f"student {escape(stage['student'])}, teacher {escape(entry['model'])}"
    return (
        f"<h2>{head}</h2><p>{about}</p><p class='verdict {kind.get(advice['verdict'], 'wait')}'>"
        f"{escape(advice['says'])}</p><ul>{reasons}</ul>{do}{''.join(_figures(entry))}"
    )


def _figures(entry: dict) -> list[str]:
    figures = []
    rows, step0 = entry.get("profile", []), entry.get("step0", {})
    if rows:
        names = {"overlap": "overlap", "overlap_mass": "mass S", "overlap_teacher_mass": "mass T"}
        title = f"Top-{step0['top']} overlap and its mass, student S and teacher T, by position"
        figures.append(_lines(title, rows, names, top=1.0))
        names = {"entropy": "student", "teacher_entropy": "teacher"}
        figures.append(_lines("Entropy by position, nats", rows, names))
        names = {"reverse": "KL(S | T)", "forward": "KL(T | S)", "log_ratio": "log S - log T"}
        figures.append(_lines("Divergence by position, nats a token", rows, names))
    if "gain" in entry:
        several = len(entry["gain"]) > 2
        points = [
            (d, [(g["gain"], g["ci95"])])
            for d, g in entry["gain"].items()
            if d != "together" or several
        ]
        figures.append(_points("Gain in accuracy on the same prompts, 95 %", points, ("teacher",)))
    if "alignment" in entry:
        signals = entry["alignment"]["signals"]
        points = [
            (SIGNALS[n], [(s[side]["mean"], s[side]["ci95"]) for side in ("wrong", "right")])
            for n, s in signals.items()
            if n != "outcome"
        ]
        title = "Cosine with the ideal update, 95 %"
        figures.append(_points(title, points, ("wrong rollouts", "right rollouts")))
    if "reach" in entry:
        names = {"student": "student", "teacher": "teacher"}
        title = "Success going on from the student's prefixes, by depth"
        figures.append(_lines(title, entry["reach"]["profile"], names, top=1.0))
    return figures


def _lines(title: str, rows: list[dict], names: dict[str, str], top: float = 0.0) -> str:
    """Return a figure of curves over windows of positions; one not measured is left out."""
    names = {k: label for k, label in names.items() if all(k in r for r in rows)}
    values = [r[k] for r in rows for k in names]
    high, low = max([top, *values]) or 1.0, min([0.0, *values])
    step = (WIDE - LEFT - 12) / max(1, len(rows) - 1)

    def y(value: float) -> float:
        return TOP + (HIGH - LOW - TOP) * (high - value) / (high - low)

    parts = [_axis(y, low, high)]
    for i, r in enumerate(rows):
        span = f"{r['from']}" if r["from"] == r["to"] else f"{r['from']}-{r['to']}"
        if len(rows) < 9 or i % 2 == 0:
            parts.append(_text(LEFT + i * step, HIGH - LOW + 16, span, "middle"))
    for colour, key in zip(COLOURS, names, strict=False):
        spots = [(LEFT + i * step, y(r[key])) for i, r in enumerate(rows)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in spots)
        parts.append(f"<polyline fill=none stroke={colour} stroke-width=2 points='{line}'/>")
        parts += [f"<circle cx={a:.1f} cy={b:.1f} r=3 fill={colour} />" for a, b in spots]
    return _figure(title, "".join(parts), HIGH, list(names.values()))


def _points(title: str, rows: list[tuple[str, list]], labels: tuple[str, ...]) -> str:
    """Return a figure of numbers from -1 to 1 with their intervals, a line for each name."""
    left, row = 150, 15 * len(labels) + 10
    height = TOP + row * len(rows) + LOW

    def x(value: float) -> float:
        return left + (WIDE - left - 12) * (max(-1.0, min(1.0, value)) + 1) / 2

    parts = []
    for tick in (-1, -0.5, 0, 0.5, 1):
        a, colour = x(tick), "#999" if tick == 0 else "#ddd"
        parts.append(f"<line x1={a:.1f} x2={a:.1f} y1={TOP} y2={height - LOW} stroke='{colour}' />")
        parts.append(_text(a, height - LOW + 16, f"{tick:g}", "middle"))
    for i, (name, values) in enumerate(rows):
        middle = TOP + row * i + row / 2
        parts.append(_text(left - 8, middle + 4, name, "end"))
        for j, (value, ends) in enumerate(values):
            if value is None:
                continue
            b, colour = middle + 11 * (j - (len(values) - 1) / 2), COLOURS[j]
            parts.append(
                f"<line x1={x(ends[0]):.1f} x2={x(ends[1]):.1f} y1={b:.1f} y2={b:.1f} "
                f"stroke={colour} stroke-width=2 />"
                f"<circle cx={x(value):.1f} cy={b:.1f} r=4 fill={colour} />"
            )
    return _figure(title, "".join(parts), height, list(labels))


def _axis(y, low: float, high: float) -> str:
    parts = []
    for tick in (low, (low + high) / 2, high):
        b = y(tick)
        parts.append(f"<line x1={LEFT} x2={WIDE - 12} y1={b:.1f} y2={b:.1f} stroke='#ddd' />")
        parts.append(_text(LEFT - 6, b + 4, f"{tick:.2g}", "end"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f"<text x={x:.1f} y={y:.1f} text-anchor={anchor}>{escape(text)}</text>"


def _figure(title: str, body: str, height: int, labels: list[str]) -> str:
    keys = " &nbsp; ".join(
        f"<span style='color:{colour}'>&#9679;</span> {escape(label)}"
        for colour, label in zip(COLOURS, labels, strict=False)
    )
    return (
        f"<figure><svg xmlns='http://www.w3.org/2000/svg' width={WIDE} height={height} "
        f"role=img aria-label='{escape(title)}'>{body}</svg>"
        f"<figcaption>{escape(title)}<br>{keys}</figcaption></figure>"
    )
