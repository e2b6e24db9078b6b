"""Exact divergence between the student and the token's own teacher, or its top-k forms.

    reverse   KL(p || q), gradient p (log p - log q - KL): DeepSeek-V4 (arXiv 2606.19348) Eq. 29
    forward   KL(q || p), gradient p - q
    jsd       beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p: GKD (2306.13649)

p is the student, q the teacher, both at the sampling temperature. The jsd of beta 0 or 1 is 0 by
its formula; as in TRL those two mean forward and reverse KL, a jump that is theirs and kept. On a
top-k support (the student's, the teacher's, or both) there are four forms, see kernels/topk.py:
tail and generalised are lower bounds of the full divergence, renormalised and truncated are
neither bound nor unbiased. Every form is reported non-negative by construction.

A teacher may give some ids no probability (a masked or a pruned vocabulary, logits of -inf). They
add nothing to the forward KL but what moves the student off them, and are finite in a jsd. The
reverse KL is infinite there by its formula, at the first token the student gives any mass: the
stage stops and names the teacher. No floor is put under the teacher's mass.

    opdctl stage opd --student DIR --teacher math=DIR 'objectives={divergence: {}}' 'signals={}'
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key
from opdctl.config.settings import ON_TOP, ObjectiveConfig
from opdctl.errors import Problem
from opdctl.protocols import Objective
from opdctl.scoring.columns import PAIR_WEIGHT


class Divergence(Objective):
    """Reverse KL, forward KL or JSD to each token's teacher, exact or on a top-k support."""

    revision = 1
    needs = ()  # all depend on its keys
    rows = "prediction"

    @dataclass(kw_only=True)
    class Config(ObjectiveConfig):
        """The keys of divergence."""

        direction: Literal["reverse", "forward", "jsd"] = key("reverse", "student first is reverse")
        beta: float = key(0.5, "weight of the teacher in jsd's mixture", least=0, most=1)
        support: Literal["full", "topk_student", "topk_teacher", "topk_union"] = key(
            "full", "the whole vocabulary, or the k most probable ids of a side"
        )
        k: int = key(16, "ids of a top-k support", least=1)
        form: Literal["tail", "generalised", "renormalised", "truncated"] = key(
            "tail",
            "on a top-k support: one bucket for the rest, none, none and both renormalised, or the "
            "teacher alone renormalised (forward)",
        )
        overlap: bool = key(True, "log in every step how the most probable ids of both overlap")

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """A truncated teacher has no mass elsewhere: only its forward KL is finite."""
        if config.form != "truncated" or config.direction == "forward":
            return []
        message = f"the {config.direction} direction to a truncated teacher has no finite value"
        return [Problem("form", message, "direction=forward, or form=tail")]

    @staticmethod
    def notes(config) -> list[Problem]:
        """Return notes on keys that do nothing here, and on the blind form for comparison."""
        problems = []
        if config.direction != "jsd" and config.beta != 0.5:
            problems.append(Problem("beta", "only a jsd has a beta", "direction=jsd"))
        if config.support == "full" and config.form != "tail":
            hint = "support=topk_student, topk_teacher or topk_union"
            problems.append(Problem("form", "the whole vocabulary has no form", hint))
        elif config.support == "full" and config.k != 16:
            hint = "support=topk_student, topk_teacher or topk_union"
            problems.append(Problem("k", "the whole vocabulary has no k", hint))
        elif config.form == "renormalised":
            problems.append(Problem("form", "blind to mass that leaves the k ids", "form=tail"))
        return problems

    @staticmethod
    def needs_for(config) -> tuple[str, ...]:
        """Return what its support asks of a teacher."""
        return ("teacher.hidden",) if config.support == "full" else ON_TOP[config.support]

    @staticmethod
    def kl_direction(config) -> str:
        """Return the direction of the KL to the teacher whose gradient it has."""
        ends = {0.0: "forward", 1.0: "reverse"}  # what a jsd of these betas means, see above
        return ends.get(config.beta, "jsd") if config.direction == "jsd" else config.direction

    def __init__(self, config) -> None:
        self.config, self.needs = config, self.needs_for(config)
        ids = math.inf if config.support == "full" else config.k
        self.compares = ids if config.overlap else 0.0

    def loss(self, view):
        """Return the loss of each token. Shape [C]."""
        config = self.config
        if config.support == "full":
            value_C = view.divergence(config.direction, config.beta, config.overlap)
        else:
            from opdctl.kernels.topk import divergence_on

            tails = config.form in ("tail", "truncated")
            top = view.topk(config.support, config.k, config.overlap, tails)
            how = (config.form, config.direction, config.beta, top.tails)
            value_C = divergence_on(top.logp_CK, top.logq_CK, top.keep_CK, *how)
            view.require_finite(value_C)
            view.log("divergence", value_C)
        return value_C * view[PAIR_WEIGHT]
