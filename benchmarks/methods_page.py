"""Turn docs/methods/*.json into docs/methods.md, with the papers' headlines that show here.

A difference or ratio is taken seed by seed, and its 95 % interval is Student's t over seeds. A
headline *shows* here if the whole interval lies on its side of no difference, is *reversed* if it
lies on the other, else it is *not shown*. Run by ``benchmarks/methods.py page``.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path

from opdctl.intervals import student

SAMPLED, FULL, IMITATION = "thinking_machines", "deepseek_v4", "seqkd"
VERSIONS = ("opdctl", "python", "torch", "transformers")
MEASURES = {  # what is compared: how it is called, whether by ratio
    "recovery": ("recovery", False),
    "step": ("steps to .9", True),
    "cpu": ("CPU seconds to .9", True),
    "whole": ("CPU seconds, whole stage", True),
    "memory": ("peak memory", True),
    "noise": ("gradient noise", True),
}


@dataclass
class Headline:
    """The headline of a paper, and the measure that is compared here.

    Attributes:
        measure: one of MEASURES; empty where nothing here can show it.
        against: the method it is compared with.
        more: True where the paper's method has more of the measure.
    """

    paper: str
    measure: str = ""
    against: str = SAMPLED
    more: bool = False


HEADLINES = {
    "thinking_machines": Headline("under 10 steps where RL took about 70: T1 in claims.md"),
    "deepseek_v4": Headline("a quieter gradient than the sampled token's; no numbers", "noise"),
    "mopd": Headline("Norm .937 over several RL teachers", "recovery", more=True),
    "glm5": Headline("no numbers"),
    "gkd": Headline(
        "gains 1.7 to 2.1 times those of off-policy distillation", "recovery", IMITATION, True
    ),
    "minillm": Headline("Rouge-L 24.6, sequence-level KD 22.7", "recovery", IMITATION, True),
    "dagger": Headline("fewer mistakes than imitation alone", "recovery", IMITATION, True),
    "seqkd": Headline("the off-policy baseline of others"),
    "vopd": Headline("a smaller variance at the same expected gradient", "noise"),
    "exopd": Headline(
        "the only one above both teachers when two are merged", "recovery", more=True
    ),
    "exopd_guarded": Headline("no collapse of format; there is no format here to lose"),
    "eopd": Headline("pass@8 1.4 to 5.1 points above OPD; accuracy here", "recovery", more=True),
    "gui_sd": Headline("entropy-weighted tokens above unweighted ones", "recovery", FULL, True),
    "reopold": Headline("6.7 to 12 times the sample efficiency", "step"),
    "revisiting": Headline("top-k above the sampled token", "recovery", more=True),
    "scope": Headline("5.5 % above OPD (Avg@32, relative)", "recovery", more=True),
    "tip": Headline("half of the tokens above all: 79.1 to 76.7", "recovery", FULL, True),
    "unmasking": Headline("signals point to success on wrong rollouts", "recovery", more=True),
    "oprd": Headline("1.44 times faster than top-k, 54 % less memory", "whole", "rethinking"),
    "oprd_bridge": Headline("best@16 33.9 to 30.8 with OPD after it, for unequal widths"),
    "effopd": Headline("more than 3 times fewer steps", "step"),
    "prune_opd": Headline("37.6 to 68 % less training time", "whole", "rethinking"),
    "rethinking": Headline(
        "overlap .55 to .75 by a cold start on teacher samples: no such arm here"
    ),
}


def page(folder: Path) -> str:
    """Return the page, in Markdown, from the JSON files of a folder."""
    setting = json.loads((folder / "_setting.json").read_text(encoding="utf-8"))
    paths = sorted(p for p in folder.glob("*.json") if not p.name.startswith("_"))
    methods = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in paths}
    out = [*_intro(setting, methods), *_table(methods), *_headlines(methods), *_notes(methods)]
    own = folder / "notes.md"
    out += [own.read_text(encoding="utf-8").rstrip()] if own.is_file() else []
    return "\n".join(out).rstrip() + "\n"


def values(content: dict, measure: str) -> dict[str, float | None]:
    """Return a measure by seed; None where it was never reached, left out where not measured."""
    out: dict[str, float | None] = {}
    for seed, one in content["seeds"].items():
        if measure in ("step", "cpu") and "arrival" in one:
            out[seed] = one["arrival"]["step" if measure == "step" else "cpu_seconds"]
        elif measure == "noise" and "gradient" in one:
            out[seed] = noise(one["gradient"])
        elif (key := {"whole": "cpu_seconds", "memory": "memory_mib"}.get(measure, measure)) in one:
            out[seed] = one[key]
    return out


def noise(gradient: dict) -> float | None:
    """Return the trace variance of one batch's gradient over the squared norm of its mean.

    The norm of an average over n batches has variance / n in it, which is subtracted; None where
    nothing is left.
    """
    signal = gradient["norm"] ** 2 - gradient["variance"] / gradient["batches"]
    return gradient["variance"] / signal if signal > 0 else None


def interval(each: list[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % interval; of one value the value three times."""
    mean = statistics.fmean(each)
    spread = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else 0.0
    half = float(student(len(each) - 1)) * spread if spread else 0.0
    return mean, mean - half, mean + half


def against(ours: dict, theirs: dict, ratio: bool) -> list[float] | None:
    """Return differences or ratios, seed by seed; None where a seed of either has no number."""
    seeds = [s for s in ours if s in theirs]
    pairs = [(ours[s], theirs[s]) for s in seeds]
    if not pairs or any(a is None or b is None for a, b in pairs):
        return None
    return [a / b if ratio else a - b for a, b in pairs]


def verdict(low: float, high: float, line: Headline, several: bool) -> str:
    """Return the verdict on a headline from its interval; the module has the rule."""
    none = 1.0 if MEASURES[line.measure][1] else 0.0
    if not several or low <= none <= high:
        return "not shown"
    return "**shows**" if (low > none) == line.more else "**reversed**"


def _paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(text, 135, break_on_hyphens=False, break_long_words=False), ""]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"


def _shown(each: list[float] | None) -> str:
    if not each:
        return ""
    mean, low, high = interval(each)
    if len(each) == 1:
        return _number(mean)
    return f"{_number(mean)} [{_number(low)}, {_number(high)}]"


def _came(each: dict[str, float | None]) -> str:
    """Format the median over seeds, never being the largest, and the number of seeds that got
    there."""
    if not each:
        return "not measured"
    middle = statistics.median_low([float("inf") if v is None else v for v in each.values()])
    count = sum(v is not None for v in each.values())
    return f"{'never' if middle == float('inf') else f'{middle:.3g}'} ({count}/{len(each)})"


def _mean(content: dict, field: str, *more: str) -> str:
    each = []
    for one in content["seeds"].values():
        value = one.get(field)
        for key in more:
            value = value and value[key]
        if value is not None:
            each.append(value)
    return f"{statistics.fmean(each):.0f}" if each else ""


def _intro(setting: dict, methods: dict) -> list[str]:
    seeds = ", ".join(setting["seeds"])
    versions = ", ".join(f"{k} {v}" for k, v in setting["versions"].items() if k in VERSIONS)
    rows = setting["seeds"].values()
    domains = list(next(iter(rows))["start"])
    names = {"start": "start", "teacher": "its domain's teacher"}
    source_text = (
        "Generated by `python benchmarks/methods.py page` from `docs/methods/*.json`; measured by "
        f"`python benchmarks/methods.py record DIR` on seeds {seeds} ({versions})."
    )
    setting_text = (
        "Every method that an opd stage runs, from one start, with one set of RL-made teachers and "
        f"the same prompts, draws, steps and learning rate: {setting['steps']} steps of "
        f"{setting['rollouts']} rollouts, a model of 0.1 M parameters, answers of three to five "
        "tokens. One learning rate, tuned for the two plain forms on seed 100, serves all of them. "
        "So this says what a method changes at this size when nothing else changes, and not what "
        "it is worth where its paper was written. Methods of RL alone have no teacher and are not "
        "here."
    )
    out = [
        "# Methods, side by side",
        "",
        *_paragraph(source_text),
        *_paragraph(setting_text),
        "| accuracy on held-out prompts | " + " | ".join(domains) + " |",
        "|---" * (1 + len(domains)) + "|",
    ]
    for role, name in names.items():
        cells = [_shown([row[role][d] for row in rows]) for d in domains]
        out.append(f"| {name} | {' | '.join(cells)} |")
    return [*out, ""]


def _table(methods: dict) -> list[str]:
    heads = (
        "method",
        "recovery",
        f"minus {SAMPLED}",
        f"minus {FULL}",
        "steps to .9",
        "CPU s to .9",
        "CPU s",
        "student's tokens",
        "teachers' tokens",
        "scored tokens",
        "MiB",
        "gradient noise",
    )
    legend = (
        "*recovery*: (after - before) / (teacher - before) on held-out prompts, mean of the "
        f"domains. The plain forms are `{SAMPLED}` (the sampled token) and `{FULL}` (the whole "
        "vocabulary). *to .9*: until the last five steps' own rollouts recovered .9, median over "
        "seeds and on how many seeds it came; rollouts are of training prompts, and a method that "
        "trains on others' samples has no such curve. *CPU s*: of the stage's process, start "
        "included. *MiB*: its peak resident memory, most of it the interpreter and its libraries. "
        "*gradient noise*: trace variance of one step's gradient at the start, over the squared "
        "norm of its mean."
    )
    out = [
        *_paragraph(legend),
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    middle = {n: interval(r)[0] if (r := _recoveries(c)) else -1.0 for n, c in methods.items()}
    for name in sorted(methods, key=lambda n: -middle[n]):
        content = methods[name]
        plain = name in (SAMPLED, FULL)
        noises = values(content, "noise")
        cells = [
            f"**{name}**" if plain else name,
            _shown(_recoveries(content)),
            *(_minus(methods, name, other) for other in (SAMPLED, FULL)),
            _came(values(content, "step")),
            _came(values(content, "cpu")),
            _mean(content, "cpu_seconds"),
            *(_mean(content, "tokens", k) for k in ("rollout", "teacher_sampled", "teacher")),
            _mean(content, "memory_mib"),
            _shown(list(noises.values())) if noises and None not in noises.values() else "",
        ]
        cells[-1] = cells[-1] or ("mean not told from noise" if noises else "not measured")
        out.append(f"| {' | '.join(cells)} |")
    return [*out, ""]


def _recoveries(content: dict) -> list[float]:
    return [one["recovery"] for one in content["seeds"].values() if "recovery" in one]


def _minus(methods: dict, name: str, other: str) -> str:
    if name == other or other not in methods:
        return ""
    pair = (values(methods[n], "recovery") for n in (name, other))
    return _shown(against(*pair, ratio=False))


def _headlines(methods: dict) -> list[str]:
    out = [
        "## What the papers report, and what shows here",
        "",
        *_paragraph(
            "Ratios and differences are of the method to what it is compared with, seed by seed. A "
            "headline **shows** if their whole 95 % interval lies on the paper's side of no "
            "difference, however far; it is **reversed** if it lies on the other side."
        ),
        "| method | the paper's headline | compared here | measured | |",
        "|---|---|---|---|---|",
    ]
    for name in methods:
        line = HEADLINES.get(name, Headline("not noted"))
        comparison, measured, word = "nothing", "", "not compared"
        if line.measure and line.against in methods:
            label, ratio = MEASURES[line.measure]
            comparison = f"{label}, {'ratio to' if ratio else 'minus'} {line.against}"
            ours, theirs = (values(methods[n], line.measure) for n in (name, line.against))
            each = against(ours, theirs, ratio)
            if each:
                _, low, high = interval(each)
                measured, word = _shown(each), verdict(low, high, line, len(each) > 1)
            elif ours and theirs:
                measured = f"{_came(ours)} to {_came(theirs)}"
                word = "not shown: not on every seed"
            else:
                word = "not measured"
        out.append(f"| {name} | {line.paper} | {comparison} | {measured} | {word} |")
    return [*out, ""]


def _notes(methods: dict) -> list[str]:
    out = []
    for name, content in methods.items():
        if content["tiny"]:
            out.append(f"- `{name}` differs here: {json.dumps(content['tiny'])}.")
        if content["not_in_variance"]:
            keys = ", ".join(content["not_in_variance"])
            out.append(f"- `{name}`: its gradient was measured without {keys}.")
        if content["variance_refused"]:
            out.append(f"- `{name}`: gradient not measured: {content['variance_refused']}.")
        if content.get("refused"):
            out.append(f"- `{name}` was not run: {content['refused']}.")
        for seed, one in content["seeds"].items():
            if "failed" in one:
                out.append(f"- `{name}`, seed {seed}: {one['failed']}.")
    return ["## Notes", "", *out, ""] if out else []
