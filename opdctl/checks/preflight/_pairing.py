"""A student and its teachers before the first step: what a check looks at, and what it says.

An outline has a tokenizer and shapes and no weights, so the checks that need no more cost no more;
weights and samples are there for those that ask. Prompts are the stage's own.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cached_property
from typing import Any

from opdctl import draws
from opdctl.checks.preflight._weights import same_weights
from opdctl.config import references
from opdctl.config.registry import member
from opdctl.config.settings import longest_turn, routes
from opdctl.errors import StageFailed, UsageError
from opdctl.rollout.prompts import prompts_within_limit
from opdctl.types import Prompt, Rollout

SAMPLED = 100  # prompts of a domain that are answered: .1 of accuracy is then two standard errors


class Pairing:
    """The student of one stage and the teachers that serve its domains.

    Args:
        ctx: the stage's.
        student: its model where it is loaded already.
        sampled: prompts of a domain that are answered.
    """

    def __init__(self, ctx, student: Any = None, sampled: int = SAMPLED) -> None:
        self.ctx, self.sampled = ctx, sampled
        self.route = routes(ctx.recipe.domains(ctx.name), ctx.config.teachers)
        used = {name for names in self.route.values() for name in names}
        every = {n: t.model for n, t in ctx.config.teachers.items() if n in used}
        self.policy = [n for n, r in every.items() if references.parse(r).form == "policy"]
        self.served = {n: r for n, r in every.items() if references.parse(r).form == "server"}
        apart = (*self.policy, *self.served)  # a server is compared when it is first spoken to
        self.teachers = {n: r for n, r in every.items() if n not in apart}
        self._given = student
        self._outlines: dict[str, Any] = {}
        self._prompts: dict[str, list[Prompt]] = {}
        self._same: dict[str, bool] = {}
        self._answers: dict[str, list[Rollout]] = {}
        self._servers: dict[str, Any] = {}

    def read(self) -> None:
        """Outlines of all.

        Raises:
            UsageError: one cannot be read; says which.
        """
        for model in (self.student, *map(self.outline, self.teachers)):
            assert model.tokenizer is not None

    @cached_property
    def student(self) -> Any:
        """Its outline, or the model itself."""
        return self._given or self.ctx.aligned(self.of(self.ctx.config.student))

    def outline(self, name: str) -> Any:
        """A teacher without its weights."""
        return self.of(self.teachers[name])

    def of(self, reference: str) -> Any:
        """Any model without its weights."""
        from opdctl.models.model import outline

        path = self.ctx.path_of(reference)
        if path not in self._outlines:
            base, trusted = references.base_of(path), self.ctx.runtime.trust_remote_code
            self._outlines[path] = outline(base or path, trusted)
            if base:
                from opdctl.models.lora import adapter_tokenizer

                self._outlines[path].tokenizer = adapter_tokenizer(self._outlines[path], path)
            self._outlines[path].name = reference
        return self._outlines[path]

    def shown(self, name: str) -> str:
        """How messages name a teacher."""
        return f"{name} ({self.teachers[name]})"

    def domains(self, name: str) -> list[str]:
        """The domains that a teacher serves."""
        return [d for d, names in self.route.items() if name in names]

    def same(self, name: str) -> bool:
        """Whether a teacher's weights are the student's, as they stand on disk."""
        if name not in self._same:
            places = [self.ctx.path_of(r) for r in (self.ctx.config.student, self.teachers[name])]
            self._same[name] = len(set(places)) == 1 or same_weights(*places)
        return self._same[name]

    @property
    def differing(self) -> list[str]:
        """The teachers that can teach something."""
        return [name for name in self.teachers if not self.same(name)]

    def prompts(self, domain: str, most: int) -> list[Prompt]:
        """At most ``most`` (at most ``sampled``) distinct training prompts of a domain, in an order
        of their own.

        Raises:
            UsageError: it has none.
        """
        if domain not in self._prompts:
            kept = self.ctx.config.prompts.pool
            pool = prompts_within_limit(self.ctx, self.student, domain, "train", kept)
            if not pool:
                raise UsageError(f"data.{domain} has no training prompts")
            order = draws.permutation(len(pool), self.ctx.seed, "preflight", domain)
            self._prompts[domain] = [pool[i] for i in order[: self.sampled].tolist()]
        return self._prompts[domain][:most]

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """The student's answers at step 0, one a prompt."""
        return self._sample(self.ctx.start(), list(self.route), "student")

    def answers(self, name: str) -> list[Rollout]:
        """A teacher's own answers to the same prompts of its domains, in the same order."""
        if name not in self._answers and name in self.served:
            self._answers[name] = self._texts(name)
        elif name not in self._answers:
            model = self.ctx.frozen(self.teachers[name])
            self._answers[name] = self._sample(model, self.domains(name), "teacher")
        return self._answers[name]

    def server(self, name: str, top: int = 0) -> Any:
        """A served teacher, asked as the stage will ask it.

        Args:
            top: k of the lists to ask for instead, when it is first spoken to.

        Raises:
            StageFailed, UsageError: it does not answer, or not for these tokens; again without
                asking it again.
        """
        if isinstance(self._servers.get(name), (StageFailed, UsageError)):
            raise self._servers[name]
        if name not in self._servers:
            from opdctl.train.assemble import asked_for, terms_of

            ctx = self.ctx
            needs, k = asked_for(terms_of(ctx.config.objectives), {})
            wants = [n.removeprefix("teacher.") for n in needs if n.startswith("teacher.")]
            wants, k = (["listed"], top) if top else (wants, k)
            given = (ctx, ctx.frozen(ctx.config.student), name, ctx.config.teachers[name].address)
            try:
                self._servers[name] = member("teachers", "server")(*given, wants, k)
            except (StageFailed, UsageError) as error:
                self._servers[name] = error
                raise
        return self._servers[name]

    @property
    def reached(self) -> list[str]:
        """The served teachers that answer as they should."""
        found = []
        for name in self.served:
            with contextlib.suppress(StageFailed, UsageError):
                self.server(name)
                found.append(name)
        return found

    def _texts(self, name: str) -> list[Rollout]:
        """A served teacher's answers, as the texts that its server writes."""
        from opdctl.rollout.sampling import empty_rollouts

        config = self.ctx.config
        prompts = [p for d in self.domains(name) for p in self.prompts(d, self.sampled)]
        api = member("teachers", "api")(self.ctx, self.student, name, config.teachers[name].address)
        found, keys = empty_rollouts(self.ctx, self.student, prompts, 0, "teacher", 1)
        answers = api.answer(prompts, keys, self.sampling)
        for rollout, (rollout.text, rollout.truncated) in zip(found, answers, strict=True):
            rollout.response_ids = self.student.encode(rollout.text)
        return found

    @property
    def sampling(self) -> Any:
        """The stage's; a limit that moves is looked at where it is largest."""
        config = self.ctx.config
        return replace(config.sampling, max_tokens=longest_turn(config))

    def _sample(self, model: Any, domains: list[str], source: str) -> list[Rollout]:
        from opdctl.rollout.sampling import sample_group

        prompts = [p for d in domains for p in self.prompts(d, self.sampled)]
        given = (self.ctx, model, prompts, 0, source)
        return sample_group(*given, samples=1, sampling=self.sampling)
