"""A weight that decays as a response drifts to prefixes where the teacher is no guide.

Prune-OPD (arXiv 2605.07804): a token is bad where fewer than tau of the student's k most probable
ids are among the teacher's; w_t = clip(1 - drop x (bad tokens up to t), 0, 1), and the loss of a
token is multiplied by w_t + base. By ``nucleus`` a token is bad where it is not in the teacher's
top-p nucleus, which costs no pass of the student. With base above 0 the tail keeps that weight, so
nothing is spared within a step; what is spared is by ``controllers/length``, which reads the
effective length, the tokens of w_t above 0, here the column ``decay``. Rows log ``drift_bad``, the
share of bad tokens, and ``drift_overlap``, the mean overlap of this weight's k, which need not be
the k of the metric ``overlap``. Constants are those of the authors' launcher as a fork has it; the
fork's own defaults are tau .9, drop .02, base 0.

    opdctl stage opd --student DIR --teacher math=DIR --method prune_opd
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key
from opdctl.errors import Problem
from opdctl.protocols import Weight
from opdctl.scoring.columns import DECAY, DRIFT_OVERLAP, TEACHER_MASS_ABOVE


class Overlap(Weight):
    """Decays with the tokens so far where student and teacher disagree (Prune-OPD)."""

    revision = 1
    needs = ()

    @dataclass(kw_only=True)
    class Config:
        """The keys of overlap."""

        by: Literal["overlap", "nucleus"] = key(
            "overlap", "a token is bad by the overlap of both top k, or outside the teacher's top p"
        )
        k: int = key(16, "ids of each side", least=1)
        tau: float = key(0.7, "least overlap of a token that is not bad", least=0, most=1)
        top_p: float = key(0.9, "mass of the nucleus (ours)", least=1e-6, most=1)
        drop: float = key(0.01, "what a bad token takes from all after it, and itself", least=0)
        base: float = key(0.5, "added to the decay: the weight of what is pruned", least=0)

    @staticmethod
    def needs_for(config) -> tuple[str, ...]:
        """Return what it needs with these keys."""
        if config.by == "nucleus":
            return ("teacher.mass_above",)
        return ("teacher.topk", "policy.overlap")

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """Refuse another one with other keys: a response has one effective length."""
        used = [o.weights["overlap"] for o in stage.objectives.values() if "overlap" in o.weights]
        if all(keys == config for keys in used):
            return []
        return [Problem("", "differs from that of another objective", "the same keys in both")]

    @staticmethod
    def notes(config) -> list[Problem]:
        """Return notes on keys of the other test, and on a test that no token fails."""
        plain, problems = Overlap.Config(), []
        for name in ("k", "tau") if config.by == "nucleus" else ("top_p",):
            if getattr(config, name) != getattr(plain, name):
                message = f"is not read where a token is bad by {config.by}"
                problems.append(Problem(name, message, "leave it out, or another by"))
        if (config.by == "overlap" and not config.tau) or not config.drop:
            name = "drop" if not config.drop else "tau"
            problems.append(
                Problem(name, "0: nothing ever decays", f"{name}={getattr(plain, name)}")
            )
        return problems

    def __init__(self, config) -> None:
        self.config = config
        self.needs = self.needs_for(config)
        self.logged = {}

    def bad(self, step):
        """Return where the teacher is no guide, [N], boolean; of pooled teachers the mean
        decides."""
        if self.config.by == "nucleus":
            return step.columns[TEACHER_MASS_ABOVE] >= self.config.top_p
        return step.columns[DRIFT_OVERLAP] < self.config.tau

    def factor(self, step):
        """Return the factor of each token. Shape [N]; leaves the decay in the column ``decay``."""
        bad_N = self.bad(step).double()
        self.logged = {"drift_bad": float(bad_N.mean())}
        if self.config.by == "overlap":
            self.logged["drift_overlap"] = float(step.columns[DRIFT_OVERLAP].mean())
        decay_N = (1 - self.config.drop * step.so_far(bad_N)).clamp(0, 1)
        step.columns[DECAY] = decay_N
        return decay_N + self.config.base
