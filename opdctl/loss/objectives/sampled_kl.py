"""A KL estimated at the sampled token and differentiated as it stands (Schulman's k2 and k3).

With u = log q(y) - log p(y), y drawn from the student p:

    k1   -u             its expected gradient is zero: refused
    k2   u^2 / 2        value biased, expected gradient that of the reverse KL, KL(p || q)
    k3   e^u - 1 - u    value that of the reverse KL, expected gradient that of the forward one

A name is refused where its gradient is not that of the divergence asked for. As a credit of the
policy gradient it is the other way round: k1 is right there (the signal reverse_kl). Holds for
fresh rollouts, one update each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key
from opdctl.config.settings import ObjectiveConfig
from opdctl.errors import Problem
from opdctl.protocols import Objective
from opdctl.scoring.columns import TEACHER, TEACHER_WEIGHT

GRADIENT = {"k2": "reverse", "k3": "forward"}  # what differentiating each one gives


class SampledKl(Objective):
    """k2 or k3 at the sampled token, differentiated: reverse and forward KL."""

    revision = 1
    needs = ("teacher.logprobs",)
    rows = "prediction"
    on_policy_only = True

    @dataclass(kw_only=True)
    class Config(ObjectiveConfig):
        """The keys of sampled_kl."""

        estimator: Literal["k1", "k2", "k3"] = key("k2", "k2 for reverse, k3 for forward")
        direction: Literal["reverse", "forward"] = key("reverse", "the KL whose gradient it has")

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """Refuse estimators whose gradient is not that of the divergence asked for."""
        right = {way: name for name, way in GRADIENT.items()}[config.direction]
        problems = []
        if config.estimator != right:
            gives = GRADIENT.get(config.estimator)
            gives = f"the gradient of the {gives} KL" if gives else "no gradient on average"
            message = f"{config.estimator}, differentiated, has {gives}"
            problems.append(Problem("estimator", message, f"estimator={right}"))
        if config.estimator == "k3" and stage.pooled:
            message = "k3 of a weighted mean of teachers is not the weighted mean of theirs"
            problems.append(Problem("estimator", message, "pooled=false, or estimator=k2"))
        if stage.epochs * stage.minibatches > 1:
            problems.append(
                Problem(
                    "",
                    "after the first update the rollouts are no longer the policy's own",
                    "epochs=1 and minibatches=1, or policy_gradient with reverse_kl",
                )
            )
        return problems

    @staticmethod
    def kl_direction(config) -> str:
        """Return the direction of the KL to the teacher whose gradient it has."""
        return config.direction

    def __init__(self, config) -> None:
        self.config = config

    def loss(self, view):
        """Return the loss of each token. Shape [C]."""
        u_C = view[TEACHER] - view.logprob_C
        value_C = 0.5 * u_C**2 if self.config.estimator == "k2" else u_C.exp() - 1 - u_C
        view.log("sampled_kl", value_C)
        view.log("entropy", view.entropy_C)
        view.log("student_logprob", view.logprob_C)
        view.log("teacher_logprob", view[TEACHER])
        return value_C * view[TEACHER_WEIGHT]
