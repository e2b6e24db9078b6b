"""The student runs away from a teacher: a KL, or the divergence that is trained, explodes.

In the tiny recipes a student starts at most 2.3 nats a token from its teacher and comes nearer.
Says nothing in a stage without a teacher: there no KL is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.config.settings import WatchdogConfig
from opdctl.protocols import Watchdog


class Kl(Watchdog):
    """Too many nats a token between the student and a domain's teacher."""

    revision = 1
    at_once = False
    hint = "lower optim.lr, or take a teacher that is nearer"

    @dataclass(kw_only=True)
    class Config(WatchdogConfig):
        """The keys of kl."""

        most: float = key(5.0, "largest KL of a domain, nats a token", role="operational", least=0)

    def __init__(self, config) -> None:
        self.config = config

    def look(self, values: dict, first: dict) -> dict[str, str]:
        """Read ``kl`` and ``divergence_by_domain``, and the log-probs of the sampled tokens."""
        nats = {**values.get("divergence_by_domain", {}), **values.get("kl", {})}
        if {"student_logprob", "teacher_logprob"} <= values.keys():
            nats["all domains"] = values["student_logprob"] - values["teacher_logprob"]
        return {
            domain: f"{value:.4g} nats a token from the teacher, above {self.config.most:g}"
            for domain, value in nats.items()
            if value > self.config.most
        }
