"""The output for a person: tables, a live view on a terminal, plain lines elsewhere.

Data goes to stdout, everything else to stderr. The only module that imports rich.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from opdctl.config.secrets import masked
from opdctl.evidence.verdict import WORDS, format_estimate, measured_lines
from opdctl.models.chat.example import heading
from opdctl.run.rundir import finite, last_row, read_json
from opdctl.run.status import Tail, last_line
from opdctl.types import WAITING

out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())

NARROW = 110  # columns of a terminal
STYLES = {
    "done": "green",
    "skip": "green",
    "running": "cyan",
    "failed": "bold red",
    "interrupted": "yellow",
    "stale": "yellow",
    "rerun": "yellow",
    "resume": "cyan",
    "blocked": "red",
    "holds": "green",
    "refuted": "red",
    "undecided": "yellow",
    "ok": "green",
    "warning": "yellow",
    "error": "bold red",
}


def emit_json(content: Any) -> None:
    """Write JSON and nothing else to stdout."""
    sys.stdout.write(json.dumps(finite(content), indent=1) + "\n")


def say(text: str, style: str = "") -> None:
    """Print a line for the person on stderr, control characters escaped."""
    err.print(Text(plain(text), style=style))


def plain(text: str) -> str:
    """Escape every character that is not printable, except line breaks.

    Text that a model or a stranger wrote cannot steer the terminal then. Credentials in addresses
    are left out.
    """
    shown = masked(text)
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in shown)


def table(columns: list[str], rows: list[list[Any]], title: str = "") -> Table:
    """Return a plain table; a cell that is a known state gets its colour, numbers align right."""
    grid = Table(
        title=title or None,
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
        title_style="bold",
        min_width=min(len(title), err.width) or None,  # else it is broken to a narrow table's width
    )
    for i, column in enumerate(columns):
        numeric = rows and all(isinstance(r[i], int | float) or r[i] in ("", None) for r in rows)
        grid.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        cells = [
            "" if v is None else f"{v:.3f}" if isinstance(v, float) else plain(str(v)) for v in row
        ]
        grid.add_row(*[Text(c, style=STYLES.get(c, "")) for c in cells])
    return grid


def keys_table(keys: list[dict[str, str]]) -> Table:
    """Return a table of keys with their types, defaults and meanings.

    On a narrow terminal each has two lines, since five columns there would break every name.
    """
    if out.width >= NARROW:
        names = ["key", "type", "default", "changes", "meaning"]
        return table(names, [list(k.values()) for k in keys])
    grid = Table(box=None, pad_edge=False, show_header=False)
    grid.add_column(overflow="fold")
    for k in keys:
        line = Text(k["key"], style="bold")
        line.append(f" = {k['default']}" if k["default"] else "", style="not bold")
        line.append(f"   {k['type']}, {k['role']}", style="not bold dim")
        grid.add_row(line)
        grid.add_row(Padding(Text(plain(k["doc"])), (0, 0, 0, 4)))
    return grid


def show(grid: Table) -> None:
    """Print a table on stdout."""
    out.print(grid)


def plan_table(planned: list) -> Table:
    """Return a table of the stages that would run, and why."""
    rows = []
    for p in planned:
        name = f"{p.run}/{p.name}" if p.run else p.name
        rows.append([name, p.kind, p.action, "; ".join(p.reasons), ", ".join(p.upstream)])
    return table(["stage", "kind", "action", "why", "reads"], rows)


def costs_table(costs: Any, planned: list) -> Table:
    """Return a table of the memory and time of each stage on a GPU; finished ones are left out."""
    rows, total = [], 0.0
    for name in (p.name for p in planned if p.action != "skip"):
        cost = costs.stages[name]
        if isinstance(cost, str):
            rows.append([name, "", "", "", "", "", "", cost])
            continue
        m, hours = cost.memory, {k: v / 3600 for k, v in cost.seconds.items()}
        total += sum(hours.values())
        held = [m.parameters + m.gradients + m.moments, m.teachers, m.cache]
        update = m.chunk + m.activations
        word = "fits" if cost.fits else f"needs {m.peak / costs.gpu.memory:.1f} GPUs of memory"
        rows.append(
            [
                name,
                *(_gib(size) for size in (*held, update, m.peak)),
                " + ".join(f"{hours[k]:.1f}" for k in ("rollout", "score", "train")),
                "; ".join(filter(None, (word, cost.unknown))),
            ]
        )
    size = costs.gpu.memory / 2**30
    rows.append(["together", "", "", "", "", "", f"{total:.1f}", ""])
    columns = ["stage", "student", "frozen", "cache", "logits, activations", "peak GiB"]
    return table(
        [*columns, "hours: rollout + score + train", ""],
        rows,
        f"Estimate for one {costs.gpu.name} of {size:.0f} GiB; another: --gpu NAME",
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def findings_table(findings: list) -> Table:
    """Return a table of the findings of the checks, and what to do about each."""
    rows = [[f.stage, f.check, f.teacher, f.severity, f.what, f.do] for f in findings]
    columns = ["stage", "check", "teacher", "", "what was found", "what to do"]
    return table(columns, rows, "Preflight")


def status_table(status: dict) -> Table:
    """Return a table of stages with state, progress and seconds."""
    rows = []
    for name, s in status["stages"].items():
        filled = round(12 * s["step"] / max(1, s["total"]))
        bar = "#" * filled + "." * (12 - filled)
        rows.append(
            [
                name,
                s["kind"],
                s["status"],
                f"{bar} {s['step']}/{s['total']}",
                f"{s['seconds']:9.1f}" if s["seconds"] else "",
                s["error"].split("\n")[0] or _latest(s["warnings"]),
            ]
        )
    title = f"{status['recipe']} {status['size']} seed {status['seed']}: {status['state']}"
    return table(
        ["stage", "kind", "status", "step", "  seconds", ""], rows, f"{title}   {status['run']}"
    )


def _latest(warnings: list[str]) -> str:
    """Return the number of warnings and the last of them; empty without any."""
    if not warnings:
        return ""
    count = f"{len(warnings)} warnings, the last in" if len(warnings) > 1 else "warning in"
    return f"{count} {warnings[-1]}"


def scores_table(scores: dict) -> Table:
    """Return a table of the accuracy on held-out prompts, by model and domain; on a narrow terminal
    with a line for each model and domain, where a line for each model would break every interval.

    Args:
        scores: see ``evidence.accuracy.accuracies``.
    """
    domains = list(dict.fromkeys(d for row in scores.values() for d in row))
    cells = {
        m: {d: format_estimate(v, ends) for d, (v, *ends) in r.items()} for m, r in scores.items()
    }
    title = "Accuracy on held-out prompts [95 % interval]"
    widths = [max(len(c) for c in (d, *(r.get(d, "") for r in cells.values()))) for d in domains]
    if max(map(len, ("model", *cells))) + sum(w + 1 for w in widths) <= out.width:
        rows = [[m, *(r.get(d, "") for d in domains)] for m, r in cells.items()]
        return table(["model", *domains], rows, title)
    rows = [[m, d, cell] for m, r in cells.items() for d, cell in r.items()]
    return table(["model", "domain", "accuracy"], rows, title)


def facts_table(stage: str, facts: dict[str, float]) -> Table:
    """Return a table of ``facts.json``, the measurements of a stage that trains nothing."""
    return table([stage, "measured"], [[name, f"{v:.4g}"] for name, v in facts.items()])


def claims_table(claims: list[dict]) -> Table:
    """Return a table of claims with their thresholds, measurements and verdicts.

    On a narrow terminal a claim has a few lines below each other, not seven columns.
    """
    if out.width < NARROW:
        return _claims_in_lines(claims)
    columns = ["claim", "verdict", "statement", "threshold", "measured [95 %]", "seeds", "source"]
    rows = [
        [
            c["name"],
            WORDS[c["holds"]],
            c["statement"],
            c["threshold"],
            "\n".join(measured_lines(c)),
            len(c["seeds"]),
            c["source"],
        ]
        for c in claims
    ]
    return table(columns, rows)


def _claims_in_lines(claims: list[dict]) -> Table:
    grid = Table(box=None, pad_edge=False, show_header=False)
    grid.add_column(overflow="fold")
    for c in claims:
        word = WORDS[c["holds"]]
        head = Text.assemble((c["name"], "bold"), " ", (word, STYLES[word]), f" {c['statement']}")
        seeds = f"{len(c['seeds'])} seed{'s' * (len(c['seeds']) != 1)}"
        about = [f"threshold: {c['threshold']}", *measured_lines(c), f"{seeds}; {c['source']}"]
        grid.add_row(head)
        grid.add_row(Padding(Text(plain("\n".join(about))), (0, 0, 0, 4)))
    return grid


def example_text(stage: str, example: dict) -> Text:
    """Return the first prompt of a stage: the trained text green and in [[ ]], the rest dim."""
    lines = Text(f"{stage}: {heading(example)}\n", style="bold")
    for part in example["parts"]:
        text = f"[[{part['text']}]]" if part["written"] else part["text"]
        lines.append(text, style="not bold green" if part["written"] else "not bold dim")
    return lines


class Progress:
    """The display of running jobs: a live table on a terminal, else a line for each change, and
    one for each running stage every ``every`` seconds."""

    def __init__(self, jobs: list, every: float = 15.0) -> None:
        self.live = Live(console=err, refresh_per_second=4) if err.is_terminal else None
        self.jobs = jobs
        self.tails = {
            (str(job.run.path), stage): Tail(job.run.stage(stage) / "metrics.jsonl", new=True)
            for job in jobs
            for stage in job.status
        }
        self.first: dict[tuple[str, str], tuple[float, int]] = {}
        self.seen: dict[tuple[str, str], str] = {}
        self.examples = {
            (str(job.run.path), stage): job.run.stage(stage) / "example.json"
            for job in jobs[:1]  # of several seeds the first
            for stage in job.status
        }
        self.examples = {k: path for k, path in self.examples.items() if not path.exists()}
        self.every, self.last, self.drawn = every, time.monotonic(), 0.0
        self.start = time.monotonic()

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        self._show_examples()
        if self.live:
            self.live.update(self._table(self.jobs))
            self.live.stop()

    def __call__(self, jobs: list) -> None:
        now, self.jobs = time.monotonic(), jobs
        due = now - self.drawn > 0.25
        self.drawn = now if due else self.drawn
        if due:
            self._show_examples()
        if self.live:
            if due:
                self.live.update(self._table(jobs))
            return
        changed = [
            (j, s, w)
            for j in jobs
            for s, w in j.status.items()
            if w not in ("pending", self.seen.get((str(j.run.path), s)))
        ]
        running = [(j, s, w) for j in jobs for s, w in j.status.items() if w == "running"]
        for job, stage, _ in [*changed, *(running if due else [])]:
            for text in self.tails[str(job.run.path), stage].read():
                name = f"{_label(job, jobs)}{stage}"
                say(f"[{now - self.start:6.1f}s] {name}: warning: {text}", "yellow")
        for job, stage, word in changed:
            if self.seen.setdefault((str(job.run.path), stage), "") != word:
                self.seen[str(job.run.path), stage] = word
                say(f"[{now - self.start:6.1f}s] {_label(job, jobs)}{stage}: {word}")
        if now - self.last > self.every:
            self.last = now
            for job, stage, _ in running:
                say(
                    f"[{now - self.start:6.1f}s] {_label(job, jobs)}{stage}: "
                    f"{self._doing(job, stage)}"
                )

    def _show_examples(self) -> None:
        """Print the first prompt of each stage once, as it appears."""
        for key, path in list(self.examples.items()):
            example = read_json(path)
            if example:
                del self.examples[key]
                err.print(example_text(key[1], example))

    def _table(self, jobs: list) -> Table:
        rows = []
        for job in jobs:
            for stage, word in job.status.items():
                tail = self.tails[str(job.run.path), stage]
                tail.read()
                doing = [self._doing(job, stage)] if word == "running" else []
                doing = "; ".join([*doing, *filter(None, [_latest(tail.warnings)])])
                rows.append([_label(job, jobs) + stage, word, doing])
        done = sum(r[1] == "done" for r in rows)
        elapsed = time.monotonic() - self.start
        return table(["stage", "status", ""], rows, f"{done}/{len(rows)} stages, {elapsed:.0f} s")

    def _doing(self, job, stage: str) -> str:
        row = last_row(job.run.stage(stage) / "metrics.jsonl")
        step, total = row.get("step", 0), job.recipe.total(stage)
        key = (str(job.run.path), stage)
        first = self.first.setdefault(key, (time.monotonic(), step))
        parts = [f"step {step}/{total}"]
        if step > first[1]:
            left = (time.monotonic() - first[0]) / (step - first[1]) * (total - step)
            parts.append(f"about {left:.0f} s left")
        for name in ("reward", "loss", "accuracy"):
            if isinstance(row.get(name), float):
                parts.append(f"{name} {row[name]:.3f}")
                break
        line = last_line(job.run / "logs" / "latest")
        return ", ".join([*parts, line] if WAITING in line else parts)


def _label(job, jobs: list) -> str:
    return f"{job.run.path.name}/" if len(jobs) > 1 else ""
