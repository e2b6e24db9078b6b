"""Reverse KL with the teacher's gain over a reference scaled: beyond the teacher for lambda > 1.

ExOPD (arXiv 2602.12125): A = (log q - log p) + (lambda - 1)(log q - log r), r the stage's
``reference``: the student's start, or the teacher before its own training. Its fixed point is
log p = lambda log q + (1 - lambda) log r + const: reverse_kl at lambda 1, between r and q below.

Two guards, both off by default and both heuristics, ours. ``guard`` caps lambda at each token where
the teacher is nearly certain below the estimate of _cliff.py (arXiv 2605.08737 found the cliff).
``format_drop`` watches the share of responses that end, and think where they are asked to: once it
is that much below the first step's, ``format_steps`` steps in a row, what lambda exceeds 1 by is
halved for good. Its count is in the checkpoint.

    opdctl stage opd --student DIR --teacher math=DIR --method exopd
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from opdctl.config.schema import key
from opdctl.config.settings import SignalConfig
from opdctl.errors import Problem
from opdctl.protocols import Signal
from opdctl.scoring.columns import (
    POLICY,
    REFERENCE,
    REFERENCE_TOP1,
    TEACHER,
    TEACHER_TOP1,
    TEACHER_WEIGHT,
)


class Extrapolation(Signal):
    """log T - log S, plus (lambda - 1)(log T - log reference): beyond the teacher (ExOPD)."""

    revision = 1
    needs = ("teacher.logprobs", "policy.logprobs", "reference.logprobs")

    @dataclass(kw_only=True)
    class Config(SignalConfig):
        """The keys of extrapolation."""

        lam: float = key(1.25, "lambda: 1 is plain reverse_kl, above it extrapolates", least=0.0)
        guard: Literal["none", "neutral", "reference"] = key(
            "none", "heuristic cap of lambda, at b = 1/2 or at the reference's own mass"
        )
        guard_clip: float = key(5.0, "c: the importance clip the cap is for", least=1.001)
        guard_margin: float = key(0.05, "how far below the estimate the cap is (ours)", least=0.0)
        guard_above: float = key(
            0.9, "tokens whose most probable one has more mass than this", least=0.0, most=1.0
        )
        format_drop: float = key(0.0, "drop of the well-formed share; 0: no watch", least=0, most=1)
        format_steps: int = key(3, "steps in a row before lambda is lowered", least=1)

    @staticmethod
    def needs_for(config) -> tuple[str, ...]:
        """Return what the guard needs."""
        neutral = ("teacher.top1",)
        reference = (*neutral, "teacher.top1_id", "reference.top1")
        return {"none": (), "neutral": neutral, "reference": reference}[config.guard]

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """A reference that is the teacher; a cap that pooled teachers do not have, or for another
        clip than the one that acts."""
        problems = []
        if stage.teachers and {t.model for t in stage.teachers.values()} == {stage.reference}:
            message = f"the reference is the teacher, {stage.reference}: there is no gain to scale"
            hint = "reference: its model before it was trained, or the student's start"
            problems.append(Problem("", message, hint))
        if config.guard != "none" and stage.pooled:
            message = "pooled teachers have no one most probable token"
            problems.append(Problem("guard", message, "pooled=false, or guard=none"))
        for name, objective in stage.objectives.items():
            weight = objective.weights.get("truncated")
            if config.guard != "none" and weight and weight.cap != config.guard_clip:
                message = f"the cap of lambda is for a clip of {config.guard_clip:g}, "
                message += f"objectives.{name} clips at {weight.cap:g}"
                problems.append(Problem("guard_clip", message, f"guard_clip={weight.cap:g}"))
        return problems

    @staticmethod
    def notes(config) -> list[Problem]:
        """Return notes on keys that do nothing here."""
        problems, own = [], {f.name: f.default for f in fields(config)}
        if config.lam == 1.0:
            message = "at lambda 1 the reference cancels, and is paid for"
            problems.append(Problem("lam", message, "lam=1.25, or signals: {reverse_kl: {}}"))
        for name in ("guard_clip", "guard_margin", "guard_above"):
            if config.guard == "none" and getattr(config, name) != own[name]:
                problems.append(Problem(name, "there is no guard", "guard=neutral"))
        if not config.format_drop and config.format_steps != own["format_steps"]:
            problems.append(
                Problem("format_steps", "nothing watches the format", "format_drop=0.1")
            )
        return problems

    @staticmethod
    def kl_direction(config) -> str:
        """Return the direction of the KL to the teacher whose gradient it has."""
        return "reverse"

    def __init__(self, config, ctx) -> None:
        self.config, self.ctx = config, ctx
        self.needs = (*self.needs, *self.needs_for(config))
        self._state = {"share": 1.0, "first": -1.0, "low": 0}
        self.logged = self._logged = {}

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        return dict(self._state)

    def load(self, state: dict) -> None:
        """Take up what a checkpoint kept."""
        self._state = dict(state)

    def credit(self, step):
        """Return the credit of each token. Shape [N]."""
        columns = step.columns
        if self.config.format_drop:
            self._look(step.rollouts)
        lam_N = self.strength(columns)
        gain_N = columns[TEACHER] - columns[REFERENCE]
        credit_N = columns[TEACHER] - columns[POLICY] + (lam_N - 1) * gain_N
        return credit_N * columns[TEACHER_WEIGHT]

    def strength(self, columns):
        """Return lambda of each token, [N]."""
        import torch

        config = self.config
        lam = config.lam
        if lam > 1:
            lam = 1 + (lam - 1) * self._state["share"]
        lam_N = torch.full_like(columns[TEACHER], lam)
        if config.guard != "none":
            from opdctl.loss.signals._cliff import threshold

            logb_N = columns[REFERENCE_TOP1] if config.guard == "reference" else None
            top1_N = columns[TEACHER_TOP1]
            edge_N = threshold(top1_N, logb_N, config.guard_clip) - config.guard_margin
            sure_N = top1_N.exp() > config.guard_above
            cap_N = torch.where(sure_N, edge_N.clamp(min=1.0), torch.inf).to(lam_N.dtype)
            self._logged["capped"] = float((cap_N < lam_N).double().mean())
            lam_N = lam_N.minimum(cap_N)
        self._logged["lambda"] = float(lam_N.mean())
        return lam_N

    def _look(self, rollouts) -> None:
        """Compare the share of well-formed responses with the first step's; lower lambda."""
        formed = [not r.truncated and self.ctx.verdicts.obeyed(r) for r in rollouts]
        share, state = sum(formed) / len(formed), self._state
        if state["first"] < 0:
            state["first"] = share
        low = share < state["first"] - self.config.format_drop
        state["low"] = state["low"] + 1 if low else 0
        if state["low"] >= self.config.format_steps:
            state["share"], state["low"] = state["share"] / 2, 0
        self._logged["well_formed"] = share
