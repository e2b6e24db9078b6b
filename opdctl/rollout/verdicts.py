"""The verdicts on responses: each domain's verifier, asked once per response."""

from __future__ import annotations

from collections import Counter
from typing import Any

from opdctl.config.registry import member
from opdctl.errors import StageFailed
from opdctl.types import Rollout

HOPELESS = 32  # answers that a verifier may raise on before the stage fails, if it passed none


class Verifiers:
    """Asks the verifiers of a stage's domains.

    Attributes:
        failed: answers that a domain's verifier raised on.
        by_domain: the verifiers made so far.
    """

    def __init__(self, ctx: Any) -> None:
        """Hold a stage's context, whose data names the verifiers."""
        self.ctx = ctx
        self.failed: Counter = Counter()
        self.by_domain: dict[str, Any] = {}
        self._judged: Counter = Counter()

    def obeyed(self, rollout: Rollout) -> bool:
        """Return True where the response thinks as its domain asks, and only then."""
        return self.ctx.prompts.data(rollout.prompt.domain).config.thinking.follows_mode(
            rollout.text
        )

    def verify(self, rollouts: list[Rollout]) -> list[float]:
        """Return 1 for each answer that the verifier of its domain passes; also set as ``right``.

        One cut at the limit is wrong, and so is one that disobeys its mode. What a verifier raises
        on an answer counts as wrong, in ``failed``, and is said once for each domain.

        Raises:
            StageFailed: the verifier of a domain raised on every one of its first answers.
        """
        waiting: dict[str, list[Rollout]] = {}
        verdicts = {id(r): r.right for r in rollouts if r.right is not None}
        for rollout in (r for r in rollouts if r.right is None):
            verdicts[id(rollout)] = 0.0
            if not rollout.truncated and self.obeyed(rollout):
                waiting.setdefault(rollout.prompt.domain, []).append(rollout)
        for domain, unjudged in waiting.items():
            for rollout, verdict in zip(unjudged, self._verdicts(domain, unjudged), strict=True):
                self._judged[domain] += 1
                if isinstance(verdict, Exception):
                    self._raised(domain, rollout, verdict)
                else:
                    verdicts[id(rollout)] = verdict
        for rollout in rollouts:
            rollout.right = verdicts[id(rollout)]
        return [verdicts[id(r)] for r in rollouts]

    def _verdicts(self, domain: str, rollouts: list[Rollout]) -> list[float | Exception]:
        """Ask the verifier that a domain names, made once; or its data, which brings its own."""
        data = self.ctx.prompts.data(domain)
        if data.procedural:
            return [data.score(r.prompt, r.text) for r in rollouts]
        if domain not in self.by_domain:
            ((name, config),) = data.config.verifier.items()
            self.by_domain[domain] = member("verifiers", name)(config, self.ctx, domain)
        thinking = data.config.thinking
        return self.by_domain[domain].score(
            [(r.prompt, thinking.split(r.text)[1]) for r in rollouts]
        )

    def _raised(self, domain: str, rollout: Rollout, error: Exception) -> None:
        self.failed[domain] += 1
        count, text = self.failed[domain], f"{type(error).__name__}: {error!s:.300}"
        verifier = f"the verifier of data.{domain} raised on"
        if count == 1:
            said = f"{verifier} an answer to prompt {rollout.prompt.id}, which counts as wrong"
            print(f"[{self.ctx.name}] warning: {said}: {text}", flush=True)
        if count == self._judged[domain] == HOPELESS:
            raise StageFailed(
                f"{verifier} each of {count} answers, lastly: {text}",
                f"data.{domain}.verifier: does it fit the data?",
            )
