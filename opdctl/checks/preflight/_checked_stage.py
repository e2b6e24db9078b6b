"""The student, teachers, prompts and answers of one stage, loaded only as far as a check needs.

An outline has a tokenizer and shapes but no weights, so a check that reads outlines alone is cheap.
Weights are loaded and answers sampled on first use. Prompts are the stage's own.
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


class CheckedStage:
    """The student of one stage and the teachers that serve its domains.

    Args:
        ctx: the context of the stage.
        student: the student's model where it is loaded already; None reads its outline.
        sampled: the most prompts of a domain that are answered.

    Attributes:
        route: the names of the teachers that serve each domain.
        teachers: name -> reference of the teachers whose weights can be read here.
        served: name -> reference of the teachers behind a server.
        policy: the names of the teachers written ``policy``: the student itself.
    """

    def __init__(self, ctx, student: Any = None, sampled: int = SAMPLED) -> None:
        self.ctx, self.sampled = ctx, sampled
        self.route = routes(ctx.recipe.domains(ctx.name), ctx.config.teachers)
        used = {name for names in self.route.values() for name in names}
        every = {n: t.model for n, t in ctx.config.teachers.items() if n in used}
        self.policy = [n for n, r in every.items() if references.parse(r).form == "policy"]
        self.served = {n: r for n, r in every.items() if references.parse(r).form == "server"}
        apart = (*self.policy, *self.served)  # a server is compared when it is first asked
        self.teachers = {n: r for n, r in every.items() if n not in apart}
        self._student = student
        self._outlines: dict[str, Any] = {}
        self._prompts: dict[str, list[Prompt]] = {}
        self._same: dict[str, bool] = {}
        self._answers: dict[str, list[Rollout]] = {}
        self._servers: dict[str, Any] = {}

    def read(self) -> None:
        """Read the outlines of the student and of every teacher in ``teachers``.

        Raises:
            UsageError: one cannot be read; the message names it.
        """
        for model in (self.student, *map(self.outline, self.teachers)):
            assert model.tokenizer is not None

    @cached_property
    def student(self) -> Any:
        """The outline of the student, or its model where that is loaded already."""
        return self._student or self.ctx.models.aligned(self.outline_of(self.ctx.config.student))

    def outline(self, name: str) -> Any:
        """Return the outline of a teacher in ``teachers``."""
        return self.outline_of(self.teachers[name])

    def outline_of(self, reference: str) -> Any:
        """Return the outline of any model: tokenizer and shapes, no weights."""
        from opdctl.models.model import outline

        path = self.ctx.models.path_of(reference)
        if path not in self._outlines:
            base, trusted = references.base_of(path), self.ctx.runtime.trust_remote_code
            self._outlines[path] = outline(base or path, trusted, self.ctx.models.chat_keys)
            if base:
                from opdctl.models.lora import adapter_tokenizer

                self._outlines[path].tokenizer = adapter_tokenizer(self._outlines[path], path)
            self._outlines[path].name = reference
        return self._outlines[path]

    def label(self, name: str) -> str:
        """Return the name of a teacher as messages show it."""
        return f"{name} ({self.teachers[name]})"

    def domains(self, name: str) -> list[str]:
        """Return the domains that a teacher serves."""
        return [d for d, names in self.route.items() if name in names]

    def same(self, name: str) -> bool:
        """Return True where a teacher's weights on disk are the student's."""
        if name not in self._same:
            both = (self.ctx.config.student, self.teachers[name])
            places = [self.ctx.models.path_of(reference) for reference in both]
            self._same[name] = len(set(places)) == 1 or same_weights(*places)
        return self._same[name]

    @property
    def differing(self) -> list[str]:
        """The teachers that can teach something."""
        return [name for name in self.teachers if not self.same(name)]

    def prompts(self, domain: str, most: int) -> list[Prompt]:
        """Return distinct training prompts of a domain, in an order drawn from the stage's seed.

        Args:
            most: the most prompts to return; never more than ``sampled`` are.

        Raises:
            UsageError: the domain has no training prompts.
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
        """The student's answers before the first step, one for each prompt."""
        return self._sample(self.ctx.models.start(), list(self.route), "student")

    def answers(self, name: str) -> list[Rollout]:
        """Return a teacher's own answers to the prompts of its domains, in the order of
        ``rollouts``."""
        if name not in self._answers and name in self.served:
            self._answers[name] = self._texts(name)
        elif name not in self._answers:
            model = self.ctx.models.frozen(self.teachers[name])
            self._answers[name] = self._sample(model, self.domains(name), "teacher")
        return self._answers[name]

    def server(self, name: str, top: int = 0) -> Any:
        """Return the client of a served teacher, which asks for what the stage will ask for.

        Args:
            top: k of the lists to ask for instead; read on the first call for a teacher only.

        Raises:
            StageFailed, UsageError: the server does not answer, or not for these tokens. A later
                call raises the same error without asking the server again.
        """
        if isinstance(self._servers.get(name), (StageFailed, UsageError)):
            raise self._servers[name]
        if name not in self._servers:
            from opdctl.scoring.asks import Asks
            from opdctl.train.assemble import asks_of_objectives

            ctx = self.ctx
            asks = asks_of_objectives(ctx.config)
            if top:
                asks = Asks.of("topk_list", top=top)
            student = ctx.models.frozen(ctx.config.student)
            address = ctx.config.teachers[name].address
            server = member("teachers", "server")
            try:
                self._servers[name] = server(ctx, student, name, address, asks)
            except (StageFailed, UsageError) as error:
                self._servers[name] = error
                raise
        return self._servers[name]

    @property
    def answering(self) -> list[str]:
        """The names of the served teachers that answer, for the student's tokens."""
        names = []
        for name in self.served:
            with contextlib.suppress(StageFailed, UsageError):
                self.server(name)
                names.append(name)
        return names

    def _texts(self, name: str) -> list[Rollout]:
        """Return a served teacher's answers, as the texts that its server writes."""
        from opdctl.rollout.sampling import empty_rollouts

        config = self.ctx.config
        prompts = [p for d in self.domains(name) for p in self.prompts(d, self.sampled)]
        api = member("teachers", "api")(self.ctx, self.student, name, config.teachers[name].address)
        rollouts, keys = empty_rollouts(self.ctx, self.student, prompts, 0, "teacher", 1)
        answers = api.answer(prompts, keys, self.sampling)
        for rollout, (rollout.text, rollout.truncated) in zip(rollouts, answers, strict=True):
            opening = self.student.opening(rollout.prompt)
            rollout.response_ids = self.student.encode(rollout.text, opening, sampled=True)
        return rollouts

    @property
    def sampling(self) -> Any:
        """The sampling keys of the stage, with the largest limit that a controller may set."""
        config = self.ctx.config
        return replace(config.sampling, max_tokens=longest_turn(config))

    def _sample(self, model: Any, domains: list[str], source: str) -> list[Rollout]:
        from opdctl.rollout.sampling import sample_group

        prompts = [p for d in domains for p in self.prompts(d, self.sampled)]
        return sample_group(self.ctx, model, prompts, 0, source, samples=1, sampling=self.sampling)
