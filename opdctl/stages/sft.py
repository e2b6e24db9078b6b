"""Supervised fine-tuning: on demonstrations of the data, or on a teacher's own verified samples.

It is the cold start of every lab's pipeline, MiMo's expert-SFT kind of teacher, and off-policy
(sequence-level) distillation. Leaves out packing across examples. Each domain has one source.

    opdctl stage sft --student FOLDER data.math.kind=jsonl data.math.path=train.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.references import parse
from opdctl.config.registry import member, needs_of, shipped
from opdctl.config.schema import REQUIRED, key, references
from opdctl.config.settings import Lora, TrainConfig
from opdctl.errors import Problem
from opdctl.stages._stage import Stage


def domain_problems(recipe, stage) -> list[Problem]:
    """Return a problem if a stage that takes prompts has no domain, or steps too small for all."""
    domains = recipe.domains(stage)
    prompts = recipe.stages[stage].prompts
    if not domains:
        return [
            Problem(
                "prompts.domains",
                "there is no data to take prompts from",
                "data.math.kind=jsonl data.math.path=FILE, or data: in the recipe",
            )
        ]
    few = [d for d, share in domains.items() if share * prompts.per_step < 1 - 1e-9]
    if few:
        return [
            Problem(
                "prompts.per_step",
                f"{prompts.per_step} prompts a step leave less than one for {few[0]}",
                "raise prompts.per_step",
            )
        ]
    return []


def _reads_texts_alone(name: str, config) -> bool:
    """Return whether an objective asks for nothing but the text: nll, and those of one's own."""
    own = name not in shipped("objectives")
    return name == "nll" or (own and not needs_of(member("objectives", name), config))


def _source_coverage(config, domains) -> list[Problem]:
    """Return a problem unless every domain has exactly one source."""
    if not config.sources or set(config.sources) - {"dataset", "teacher"}:
        hint = "sft takes dataset, teacher, or both"
        return [Problem("sources", f"{list(config.sources)} given", hint)]
    named = [d for s in config.sources.values() for d, on in s.domains.items() if on]
    rest = [n for n, s in config.sources.items() if not s.domains]
    left = [d for d in domains if d not in named]
    unused = [n for n, s in config.sources.items() if s.domains and not any(s.domains.values())]
    wrong = ""
    if unused:
        wrong = f"{unused[0]} has no domain that is true"
    elif unknown := [d for d in named if d not in domains]:
        wrong = f"no prompt here is of {unknown[0]!r}"
    elif twice := [d for d in named if named.count(d) > 1]:
        wrong = f"two sources have {twice[0]!r}"
    elif len(rest) > 1 or (rest and not left):
        wrong = f"nothing says which domains {rest[-1]} has"
    elif left and not rest:
        wrong = f"no source has {left[0]!r}"
    hint = "sources: {teacher: {model: REF, domains: {math: true}}, dataset: {}}"
    return [Problem("sources", wrong, hint)] if wrong else []


def _unanswered_environments(config, recipe, stage) -> list[Problem]:
    """Return domains with an environment whose answers come from an API, in one turn each."""
    source = config.sources.get("teacher")
    served = {k: r for k, r in (references(source) if source else []) if parse(r).form == "server"}
    problems = []
    for domain in recipe.domains(stage) if served else ():
        key = f"experts.{domain}" if domain in source.experts else "model"
        mine = source.domains.get(domain, not source.domains)
        if key in served and mine and recipe.data[domain].environment:
            message = (
                f"{served[key]} answers {domain} in one turn, and its environment is not asked"
            )
            hint = "a folder or a public name, or data without an environment"
            problems.append(Problem(f"sources.teacher.{key}", message, hint))
    return problems


class Sft(Stage):
    """A student on demonstrations, or on a teacher's verified samples."""

    revision = 1
    writes = "model"
    uses = ("engines/transformers",)

    @dataclass(kw_only=True)
    class Config(TrainConfig):
        """The keys of an sft stage."""

        student: str = key(REQUIRED, "where it starts", ref=True)
        lora: Lora = key(Lora(), "an adapter in place of the weights", neutral=True)
        sources: dict = key(
            {"dataset": {}}, "dataset, teacher, or both with their domains", family="sources"
        )
        objectives: dict = key(
            {"nll": {"normalise": "token_mean"}}, "what is minimised", family="objectives"
        )

    @staticmethod
    def problems(config, recipe, stage):
        """Return what the schema cannot check of the stage's keys."""
        problems = domain_problems(recipe, stage)
        problems += _source_coverage(config, recipe.domains(stage))
        for name, objective in config.objectives.items():
            if objective.weights or not _reads_texts_alone(name, objective):
                problems.append(
                    Problem(
                        f"objectives.{name}",
                        "a demonstration has no advantage, no reward and no sampler's log-probs",
                        "objectives: {nll: {}}",
                    )
                )
        problems += _unanswered_environments(config, recipe, stage)
        if not any(o.coef for o in config.objectives.values()):
            problems.append(Problem("objectives", "nothing to minimise", "objectives: {nll: {}}"))
        return problems

    def run(self, ctx):
        """Load the start, train, write the output."""
        from opdctl.train.assemble import TrainSetup, source_of, terms_of
        from opdctl.train.loop import train

        config = ctx.config
        model = ctx.models.student()
        return train(
            ctx,
            model,
            lambda ctx, model: TrainSetup(
                source_of(ctx, model, config.sources), terms_of(config.objectives)
            ),
        )
