"""Everything ``opdctl diagnose`` measures of one stage: a student, its teachers, its prompts.

The checks of ``preflight/`` come first, and one that finds an error ends it: two vocabularies have
no divergence. Then of each teacher, on the student's own answers: how the two agree, by position;
how much better it is, on the same prompts; whether its signals point where the task wants. Nothing
is trained and nothing is written but ``diagnosis.json``. Seeds are the stage's, so the same command
gives the same numbers.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from opdctl.core.metrics import mean
from opdctl.core.tokens import per_sequence, places
from opdctl.diagnosis.alignment import alignment
from opdctl.diagnosis.nodes import window
from opdctl.nets.agreement import compared, top_of
from opdctl.preflight._pairing import Pairing
from opdctl.preflight._stage import check
from opdctl.preflight.gain import paired


@dataclass(frozen=True)
class Effort:
    """What a diagnosis may cost.

    Attributes:
        prompts: of each domain, answered once by the student and once by each teacher.
        budget: continuations sampled for the alignment, for each teacher.
        top: tokens forced at each node.
        samples: continuations of each.
    """

    prompts: int = 100
    budget: int = 4096
    top: int = 8
    samples: int = 8


class Told:
    """Progress: one line each, on stderr."""

    def __init__(self, stage: str) -> None:
        self.stage, self.start = stage, time.monotonic()

    def __call__(self, what: str) -> None:
        spent = time.monotonic() - self.start
        print(f"[{spent:6.1f}s] {self.stage}: {what}", file=sys.stderr, flush=True)


def measure(ctx: Any, effort: Effort) -> dict:
    """What is found of a stage: ``checks``, and under ``teachers`` what stands in the module.

    Raises:
        UsageError: a model cannot be read, or there are no prompts.
    """
    told = Told(ctx.name)
    told("checks")
    found = check(ctx)
    result: dict[str, Any] = {
        "stage": ctx.name,
        "student": ctx.config.student,
        "seed": ctx.recipe.seed,
        "temperature": ctx.config.sampling.temperature,
        "max_tokens": ctx.config.sampling.max_tokens,
        "effort": asdict(effort),
        "checks": [asdict(f) for f in found if f.severity != "ok"],
        "refused": any(f.severity == "error" and f.check != "distinct" for f in found),
        "teachers": {},
    }
    if result["refused"]:
        return result
    pairing = Pairing(ctx, sampled=effort.prompts)
    names = [*pairing.teachers, *pairing.served, *pairing.policy]
    asked = [n for n in names if n in pairing.served or n in pairing.differing]
    if asked:
        told(f"the student answers {effort.prompts} prompts of {', '.join(pairing.route)}")
        ctx.verify(pairing.rollouts)
    for name in names:
        own = name not in asked
        entry = {"model": ctx.config.teachers[name].model, "domains": pairing.domains(name)}
        entry |= {"same": own, "served": name in pairing.served, "missing": {}}
        if not own:
            _teacher(ctx, pairing, name, effort, entry, told)
        result["teachers"][name] = entry
    return result


def _teacher(ctx, pairing: Pairing, name: str, effort: Effort, entry: dict, told: Told) -> None:
    """Fill in what is measured of one teacher."""
    told(f"teacher {name} answers the same prompts")
    domains = pairing.domains(name)
    gains = {d: paired(pairing, name, d) for d in domains}
    entry["gain"] = {d: told_gain(found) for d, found in gains.items()}
    entry["gain"]["together"] = told_gain(pooled(list(gains.values())))
    told(f"teacher {name}: agreement on the student's answers")
    rollouts = [r for r in pairing.rollouts if r.prompt.domain in domains]
    models = [ctx.frozen(r) for r in (ctx.config.student, pairing.teachers[name])]
    requests = [r.request for r in rollouts]
    table, sides = compared(ctx, *models, requests, ctx.config.sampling.temperature)
    lengths = torch.tensor([r.length for r in rollouts], device=sides[0][0].device)
    sequence_N = torch.repeat_interleave(torch.arange(len(rollouts)), lengths)
    entry["step0"] = {"top": top_of(sides[0][1]), "tokens": len(sequence_N)}
    entry["step0"] |= {what: spread(v_N, sequence_N) for what, v_N in table.items()}
    entry["profile"] = profile(table, sequence_N, len(rollouts))
    entry |= alignment(ctx, models, rollouts, sides, effort, lambda t: told(f"teacher {name}: {t}"))


def pooled(found: list[dict]) -> dict:
    """The domains of a teacher together, each prompt counting once."""
    from opdctl.core.evaluation import half_width

    right = [pair for one in found for pair in one["right"]]
    gaps = [t - s for s, t in right]
    half, centre = half_width(gaps) if len(gaps) > 1 else 1.0, mean(gaps)
    sides = {"student": mean(s for s, _ in right), "teacher": mean(t for _, t in right)}
    ends = [centre - half, centre + half]
    return {**sides, "gain": centre, "ci95": ends, "prompts": len(right), "right": right}


def told_gain(found: dict) -> dict:
    """A paired gain with, in place of the verdicts, what the teacher solves of what the student
    fails, and fails of what it solves."""
    from opdctl.core.evaluation import half_width

    result = {k: v for k, v in found.items() if k != "right"}
    for what, side in (("solves", 0.0), ("loses", 1.0)):
        given = [t if what == "solves" else 1 - t for s, t in found["right"] if bool(s) == side]
        half = half_width(given) if len(given) > 1 else 1.0
        share = mean(given)
        result[what] = {"of": len(given), "mean": share if given else None}
        result[what]["ci95"] = [max(0.0, share - half), min(1.0, share + half)] if given else None
    return result


def spread(value_N: Tensor, sequence_N: Tensor) -> dict:
    """Mean over tokens, and its 95 % interval: responses are independent, their tokens are not."""
    value_N, count = value_N.double(), int(sequence_N.max()) + 1
    centre = float(value_N.mean())
    off_B = per_sequence(value_N - centre, sequence_N, count)
    half = math.inf
    if count > 1:
        half = 1.96 * float((off_B**2).sum() * count / (count - 1)) ** 0.5 / len(value_N)
    return {"mean": centre, "ci95": [centre - half, centre + half]}


def profile(table: dict[str, Tensor], sequence_N: Tensor, count: int) -> list[dict]:
    """Means by position in the response, in windows that double."""
    place_N, _ = places(sequence_N, count)
    found, first = [], 0
    while (place_N >= first).any():
        _, last = window(first)
        inside_N = (place_N >= first) & (place_N <= last)
        row = {"from": first, "to": min(last, int(place_N.max())), "tokens": int(inside_N.sum())}
        found.append(row | {k: float(v[inside_N].double().mean()) for k, v in table.items()})
        first = last + 1
    return found
