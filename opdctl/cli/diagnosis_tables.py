"""Print a diagnosis on a terminal: a verdict with its reasons, then the numbers, in 80 columns."""

from __future__ import annotations

import textwrap
from typing import Any

from opdctl.cli.console import findings_table, out, table
from opdctl.cli.console import show as show_table
from opdctl.types import Finding

STYLES = {"go": "bold green", "nothing_to_learn": "bold red", "another_teacher": "bold red"}
SIGNALS = {
    "reverse_kl": "reverse KL, all tokens",
    "forward_kl": "forward KL, all tokens",
    "jsd": "JSD .5, all tokens",
    "top_k": "top k of the student",
    "sampled": "sampled token",
    "outcome": "outcome (no teacher)",
}
COLUMNS = {
    "overlap": "overlap",
    "overlap_mass": "mass S",
    "overlap_teacher_mass": "mass T",
    "overlap_advantage": "adv.",
    "log_ratio": "log S - log T",
    "reverse": "KL(S|T)",
    "forward": "KL(T|S)",
    "entropy": "H(S)",
    "teacher_entropy": "H(T)",
}


def show(stages: list[dict]) -> None:
    """Print every stage and teacher on stdout.

    Args:
        stages: the entries of ``opdctl diagnose --json``.
    """
    for stage in stages:
        bad = [Finding(**f) for f in stage["checks"]]
        if bad:
            show_table(findings_table(bad))
        if stage["refused"]:
            print("nothing was measured: mend what the checks found first")
        for name, entry in stage["teachers"].items():
            _teacher(stage, name, entry)


def _teacher(stage: dict, name: str, entry: dict) -> None:
    advice = entry["recommendation"]
    out.print(f"\n{stage['stage']}: teacher {name} ({entry['model']})", style="bold", markup=False)
    style = STYLES.get(advice["verdict"], "bold yellow")
    out.print(advice["says"].upper(), style=style, markup=False)
    for reason in advice["reasons"]:
        _wrapped(f"- {reason}")
    for line in advice["do"]:
        print(f"  do: {line}")  # unbroken, to be copied
    for grid in grids(stage, entry):
        print()
        show_table(grid)


def grids(stage: dict, entry: dict) -> list[Any]:
    """Return the tables of a teacher's measurements."""
    tables = []
    if "gain" in entry:
        tables.append(_gain(entry["gain"]))
    if "profile" in entry:
        tables.append(_profile(stage, entry))
    if "alignment" in entry:
        tables.append(_alignment(entry["alignment"]))
    if "reach" in entry:
        tables.append(_reach(entry["reach"]))
    return tables


def _gain(gain: dict) -> Any:
    rows = [
        [
            domain,
            f"{g['student']:.2f}",
            f"{g['teacher']:.2f}",
            _with(g["gain"], g["ci95"], "+"),
            _share(g["solves"]),
            _share(g["loses"]),
        ]
        for domain, g in gain.items()
        if domain != "together" or len(gain) > 2
    ]
    columns = ["domain", "student", "teacher", "gain [95 %]", "solves of failed", "loses"]
    return table(columns, rows, "Accuracy on the same prompts")


def _share(value: dict) -> str:
    return "" if value["mean"] is None else f"{value['mean']:.2f} of {value['of']}"


def _profile(stage: dict, entry: dict) -> Any:
    step0 = entry["step0"]
    served = "log_ratio" in step0
    shown = {k: v for k, v in COLUMNS.items() if k in step0}
    rows = [[f"{r['from']}-{r['to']}", r["tokens"], *_numbers(r, shown)] for r in entry["profile"]]
    whole = {k: step0[k]["mean"] for k in shown}
    rows.append(["all", step0["tokens"], *_numbers(whole, shown)])
    title = f"On the student's answers, top {step0['top']}, nats a token at temperature"
    at = 1.0 if served else stage["temperature"]  # a server's log-probs are those at 1
    return table(["position", "tokens", *shown.values()], rows, f"{title} {at:g}")


def _numbers(row: dict, shown: dict[str, str]) -> list[str]:
    return [f"{row[name]:.2f}" for name in shown]


def _alignment(alignment: dict) -> Any:
    rows = []
    for name, sides in alignment["signals"].items():
        wrong, right = sides["wrong"], sides["right"]
        draw = f"{wrong['one_draw']:.2f}" if wrong.get("one_draw") is not None else ""
        noise = f"{wrong['noise']:.1f}" if wrong.get("noise") is not None else ""
        if name == "outcome":
            both = ["1 by definition", "1 by definition"]
        else:
            both = [_with(s["mean"], s["ci95"], "") for s in (wrong, right)]
        rows.append([SIGNALS[name], *both, draw, noise])
    sides = alignment["sides"]
    heads = [f"{s}, {sides[s]['nodes'] - sides[s]['undecided']} nodes" for s in ("wrong", "right")]
    columns = ["signal", *heads, "1 draw", "noise"]
    title = "Cosine with the ideal update by rollout (1 draw, noise: wrong ones)"
    return table(columns, rows, title)


def _reach(reach: dict) -> Any:
    rows = []
    for r in reach["profile"]:
        rates = [f"{r[n]:.2f}" if n in r else "" for n in ("student", "teacher")]
        more = [f"{r[n]:+.2f}" if n in r else "" for n in ("beyond", "advantage")]
        rows.append([f"{r['from']}-{r['to']}", r["nodes"], *rates, *more])
    columns = ["position", "nodes", "student", "teacher", "beyond", "one token"]
    return table(columns, rows, "Success going on from the student's prefixes")


def _with(value: float | None, ends: list | None, sign: str) -> str:
    if value is None or ends is None:
        return "not measured"
    return f"{value:{sign}.2f} [{ends[0]:{sign}.2f}, {ends[1]:{sign}.2f}]"


def _wrapped(text: str) -> None:
    for line in textwrap.wrap(text, min(out.width, 120), subsequent_indent="  "):
        print(line)
