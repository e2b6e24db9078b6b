"""The verdicts on responses: each domain's verifier, asked once per response."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from opdctl.config.registry import member
from opdctl.errors import StageFailed
from opdctl.types import Prompt, Rollout

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
        """Return a verdict on the answer in each response; a response without an answer is wrong.

        The domain's ``extract`` finds the answer, its ``reference`` the part to compare it with.
        """
        data = self.ctx.prompts.data(domain)
        config = data.config
        verdicts: list[float | Exception] = [0.0] * len(rollouts)
        places, answers = [], []
        for place, rollout in enumerate(rollouts):
            plain = data.procedural and not config.extract.chosen  # its scorer leaves thinking out
            text = rollout.text if plain else config.thinking.split(rollout.text)[1]
            prompt = rollout.prompt
            try:
                answer = config.extract.find(text)
                if config.reference.chosen:
                    prompt = replace(prompt, answer=config.reference.find(prompt.answer))
            except TimeoutError as error:
                verdicts[place] = error
                continue
            if answer is not None:
                places.append(place)
                answers.append((prompt, answer))
        for place, verdict in zip(places, self._scores(domain, data, answers), strict=True):
            verdicts[place] = verdict
        return verdicts

    def _scores(
        self, domain: str, data: Any, answers: list[tuple[Prompt, str]]
    ) -> list[float | Exception]:
        """Ask the verifier that a domain names, made once; or its data, which brings its own."""
        if data.procedural:
            return [data.score(prompt, answer) for prompt, answer in answers]
        if domain not in self.by_domain:
            ((name, config),) = data.config.verifier.items()
            verifier = member("verifiers", name)(config, self.ctx, domain)
            verifier.extracted = data.config.extract.chosen
            self.by_domain[domain] = verifier
        return self.by_domain[domain].score(answers) if answers else []

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
