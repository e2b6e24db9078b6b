"""Everything ``opdctl diagnose`` measures of one stage: a student, its teachers, its prompts.

The checks of ``preflight/`` come first, and one that finds an error ends it: two vocabularies have
no divergence. Then of each teacher, on the student's own answers: how the two agree, by position;
how much better it is, on the same prompts; whether its signals point where the task wants. Nothing
is trained and nothing is written but ``diagnosis.json``. Seeds are the stage's, so the same command
gives the same numbers.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from opdctl.checks.diagnosis import directions
from opdctl.checks.diagnosis.alignment import alignment
from opdctl.checks.diagnosis.served import ask, by_server, keeping_nothing
from opdctl.checks.diagnosis.summary import owners, pooled, profile, spread, told_gain
from opdctl.checks.preflight._pairing import Pairing
from opdctl.checks.preflight._stage import check
from opdctl.checks.preflight.gain import paired
from opdctl.kernels.chunks import rows_in
from opdctl.scoring.overlap import compared, top_of


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
        UsageError: a model cannot be read, there are no prompts, or a server is not what is named.
        StageFailed: a server does not answer, or stops to.
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
    with keeping_nothing():
        ask(pairing, told)
        _sampled(ctx, pairing, effort, result["teachers"], told)
    return result


def _sampled(ctx, pairing: Pairing, effort: Effort, entries: dict, told: Told) -> None:
    """Fill in the entry of each teacher."""
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
        entries[name] = entry


def _teacher(ctx, pairing: Pairing, name: str, effort: Effort, entry: dict, told: Told) -> None:
    """Fill in what is measured of one teacher."""
    domains = pairing.domains(name)
    told(f"teacher {name} answers the same prompts")
    gains = {d: paired(pairing, name, d) for d in domains}
    entry["gain"] = {d: told_gain(found) for d, found in gains.items()}
    entry["gain"]["together"] = told_gain(pooled(list(gains.values())))
    rollouts = [r for r in pairing.rollouts if r.prompt.domain in domains]
    given = (rollouts, effort, entry, lambda text: told(f"teacher {name}: {text}"))
    if entry["served"]:
        by_server(pairing, name, *given)
    else:
        _by_weights(pairing.teachers[name], ctx, *given)


def _by_weights(reference: str, ctx, rollouts, effort: Effort, entry: dict, told) -> None:
    """Of a teacher whose weights are here."""
    told("agreement on the student's answers")
    models = [ctx.start(), ctx.frozen(reference)]
    requests = [r.request for r in rollouts]
    table, sides = compared(ctx, *models, requests, ctx.config.sampling.temperature)
    top = top_of(sides[0][1])
    sequence_N = owners(rollouts, sides[0][0].device)
    entry["step0"] = {"top": top, "tokens": len(sequence_N)}
    entry["step0"] |= {what: spread(v_N, sequence_N) for what, v_N in table.items()}
    entry["profile"] = profile(table, sequence_N, len(rollouts))

    def see(_, at_N: Tensor) -> directions.Seen:
        rows = [(hidden_ND[at_N], head) for hidden_ND, head in sides]
        size = max(1, rows_in(ctx.runtime.chunk_mib, sides[0][1]) // 16)  # it keeps as many copies
        width = min(effort.top, sides[0][1].valid_V)
        return directions.look(*rows[0], *rows[1], candidates=width, top=top, size=size)

    entry |= alignment(ctx, models, rollouts, see, effort, told)
