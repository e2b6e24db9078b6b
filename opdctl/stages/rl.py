"""Reinforcement learning with verifiable rewards: GRPO (arXiv 2402.03300).

With DAPO's asymmetric clip (arXiv 2503.14476) and, as an option, GLM-5's gate (arXiv 2602.15763
Eq. 1). Leaves out a critic, a KL term to a reference and dynamic sampling of groups.

    opdctl stage rl --student FOLDER data.math.kind=jsonl data.math.path=train.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opdctl.config.registry import member, needs_of, parse_need
from opdctl.config.schema import REQUIRED, key
from opdctl.config.settings import Lora, Prompts, Sampling, TrainConfig
from opdctl.errors import Problem
from opdctl.stages._combinations import combination_problems
from opdctl.stages._stage import Stage
from opdctl.stages.sft import domain_problems


@dataclass(kw_only=True)
class OnPolicyConfig(TrainConfig):
    """The keys of a stage whose student samples."""

    student: str = key(REQUIRED, "where it starts", ref=True)
    lora: Lora = key(Lora(), "an adapter in place of the weights", neutral=True)
    sampling: Sampling = key(Sampling(), "how the student samples")
    epochs: int = key(1, "passes over a step's rollouts", least=1, was="updates_per_rollout")
    minibatches: int = key(1, "optimizer steps in a pass", least=1)
    controllers: dict = key(
        {},
        "what follows a step, or acts on the weights after it",
        family="controllers",
        neutral=True,
    )


def member_problems(config, provided: set[str]) -> list[Problem]:
    """Return what is wrong with a stage's signals, objectives, weights, controllers and sources.

    Args:
        provided: the needs that the stage's teachers and reference meet.
    """
    active = {n: s for n, s in config.signals.items() if s.coef}
    return [
        *_unmet_needs(config, active, provided),
        *_own_problems(config, active),
        *_objective_problems(config, active),
        *_ratio_problems(config),
        *_size_problems(config, active),
    ]


def _unmet_needs(config, active: dict, provided: set[str]) -> list[Problem]:
    """Return members whose needs nothing in the stage provides."""
    provided = provided | {
        "policy.logprobs",
        "old.logprobs",
        "policy.entropy",
        "student.hidden",
        "verdict",
        "reward",
        "group",
    }
    if active:
        provided.add("advantage")
    if all(member("sources", n).has_logprobs for n in _sources(config)):
        provided.add("behaviour.logprobs")
    if "teacher.hidden" in provided:
        provided.add("policy.kl")
    if "teacher.topk" in provided:
        provided.add("policy.overlap")
    own = config.controllers.items()
    wanted = {f"controllers.{n}": (member("controllers", n), c) for n, c in own}
    wanted |= {f"signals.{n}": (member("signals", n), s) for n, s in active.items()}
    for name, objective in config.objectives.items():
        wanted[f"objectives.{name}"] = (member("objectives", name), objective)
        for w, keys in objective.weights.items():
            wanted[f"objectives.{name}.weights.{w}"] = (member("weights", w), keys)
    problems = []
    for path, (cls, keys) in wanted.items():
        for need in needs_of(cls, keys):
            if parse_need(need)[0] not in provided:
                hint = f"remove it, or use a stage that has {need}"
                if need == "advantage":
                    hint = "add a signal with coef above 0"
                elif need.startswith("reference."):
                    hint = "reference=policy, the student's start, or the teacher's base"
                message = f"needs {need}, which nothing here provides"
                problems.append(Problem(path, message, hint))
    return problems


def _own_problems(config, active: dict) -> list[Problem]:
    """Return what members in use say of their own keys."""
    problems = []
    for path, keys in active_members(config, active).items():
        cls = member(*path.split(".")[-2:])
        for problem in cls.problems(keys, config):
            full = ".".join(filter(None, (path, problem.path)))
            problems.append(replace(problem, path=full))
    return problems


def _objective_problems(config, active: dict) -> list[Problem]:
    """Return a lack of objectives, those of other stage kinds, and signals that none uses."""
    problems, hint = [], "objectives: {policy_gradient: {}}"
    if not any(o.coef for o in config.objectives.values()):
        problems.append(Problem("objectives", "no objective with a coef above 0", hint))
    if any(member("objectives", n).rows == "token" for n in config.objectives):
        problems.append(Problem("objectives", f"{list(config.objectives)} given", hint))
    used = [n for n, o in config.objectives.items() if o.coef]
    if active and not any("advantage" in member("objectives", n).needs for n in used):
        message = f"no objective uses the advantage of {', '.join(active)}"
        problems.append(Problem("signals", message, f"signals: {{}}, or {hint}"))
    return problems


def _ratio_problems(config) -> list[Problem]:
    """Return objectives that apply the ratio of trainer to sampler twice."""
    problems = []
    for name, objective in config.objectives.items():
        ratios = [w for w in objective.weights if member("weights", w).is_importance_weight]
        if len(ratios) > 1:
            message = f"{' and '.join(ratios)}: each applies the ratio of trainer to sampler"
            problems.append(Problem(f"objectives.{name}.weights", message, "keep one"))
        gate = objective.weights.get("is_gate")
        if gate and (objective.clip_low or objective.clip_high):
            problems.append(
                Problem(
                    f"objectives.{name}.weights.is_gate",
                    "with a clip the ratio to the sampler would be applied twice",
                    "weights: {pop: {}} beside a clip, or no clip",
                )
            )
    return problems


def _size_problems(config, active: dict) -> list[Problem]:
    """Return more minibatches than responses, and a group baseline over groups of one."""
    problems = []
    if config.minibatches > config.prompts.per_step * config.prompts.samples:
        problems.append(Problem("minibatches", "more of them than responses in a step"))
    outcome = active.get("outcome")
    if outcome and outcome.baseline == "group" and config.prompts.samples < 2:
        problems.append(
            Problem(
                "prompts.samples",
                "a group of one has no group baseline: the outcome would be 0",
                "prompts.samples=4, or signals.outcome.baseline=none, or signals.outcome.coef=0",
            )
        )
    return problems


def _sources(config) -> dict:
    return config.sources or {"student": None}


def active_members(config, active: dict) -> dict:
    """Return the keys of every member in use by its path: signals, controllers, sources and so on.

    Args:
        active: the signals with a coef above 0.
    """
    used = {f"signals.{name}": keys for name, keys in active.items()}
    used |= {f"controllers.{n}": keys for n, keys in config.controllers.items()}
    used |= {f"sources.{name}": keys for name, keys in config.sources.items()}
    for name, objective in config.objectives.items():
        if objective.coef:
            path = f"objectives.{name}"
            used[path] = objective
            used |= {f"{path}.weights.{w}": keys for w, keys in objective.weights.items()}
    return used


def ineffective_keys(config) -> list[Problem]:
    """Return keys that are well formed and have no effect in this combination."""
    problems = []
    for path, keys in active_members(
        config, {n: s for n, s in config.signals.items() if s.coef}
    ).items():
        notes = member(*path.split(".")[-2:]).notes(keys)
        problems += [replace(n, path=f"{path}.{n.path}") for n in notes]
    for name, signal in config.signals.items():
        live = signal.coef and signal.policy == "live"
        if live and config.epochs * config.minibatches == 1:
            problems.append(
                Problem(
                    f"signals.{name}.policy",
                    "with one update per rollout the policy that made it is the live one",
                    "minibatches=2, or policy=old",
                )
            )
    for name, objective in config.objectives.items():
        clip = objective.clip_low or objective.clip_high
        if clip and config.epochs * config.minibatches == 1:
            problems.append(
                Problem(
                    f"objectives.{name}.clip_high",
                    "with one update per rollout the ratio is 1 and the clip cannot act",
                    "minibatches=2, or clip_low=0 and clip_high=0",
                )
            )
    return problems


class Rl(Stage):
    """GRPO: group advantage of the outcome, policy gradient with an asymmetric clip."""

    revision = 1
    writes = "model"
    uses = ("sources/student", "engines/transformers", "rewards/verifier", "rewards/model")

    @dataclass(kw_only=True)
    class Config(OnPolicyConfig):
        """The keys of an rl stage."""

        prompts: Prompts = key(Prompts(samples=8), "which prompts")
        minibatches: int = key(2, "optimizer steps in a pass; with one, a clip cannot act", least=1)
        signals: dict = key({"outcome": {}}, "what the advantage is made of", family="signals")
        objectives: dict = key(
            {"policy_gradient": {"clip_low": 0.2, "clip_high": 0.28}},
            "what is minimised",
            family="objectives",
        )

    @staticmethod
    def problems(config, recipe, stage):
        """Return what the schema cannot check of the stage's keys."""
        problems = domain_problems(recipe, stage) + member_problems(config, set())
        return problems + combination_problems(config)

    @staticmethod
    def notes(config):
        """Return keys that are allowed and have no effect."""
        return ineffective_keys(config)

    def run(self, ctx):
        """Load the start, train, write the output."""
        from opdctl.train.assemble import on_policy
        from opdctl.train.loop import train

        model = ctx.models.student()
        return train(ctx, model, lambda ctx, model: on_policy(ctx, model, {}))
