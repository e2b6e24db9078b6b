"""On-policy distillation: the student samples, the teacher of the prompt's domain scores every
token, and the score is the token's advantage. With one teacher per domain it is MOPD.

MiMo-V2-Flash (arXiv 2601.02780) Eq. 7-9: advantage = sg[log T - log S] + alpha x outcome,
importance weight zeroed outside [low, high], 1/|y| per response. With coefficient 0 a signal is
off, so KL only and outcome only are this stage too. With ``pooled`` every teacher of a domain
teaches each of its samples, and the objective is the weighted sum over them.

    opdctl stage opd --student FOLDER --teacher math=FOLDER --teacher sort=FOLDER
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opdctl.config import references
from opdctl.config.registry import member, needs_of, parse_need
from opdctl.config.schema import did_you_mean, key
from opdctl.config.settings import Teacher, routes
from opdctl.errors import Problem
from opdctl.estimate.shape import shape_of
from opdctl.stages._combinations import combination_problems, source_problems
from opdctl.stages.rl import OnPolicyConfig, cannot_act, in_use, member_problems
from opdctl.stages.sft import needs_domains


class Opd:
    """The student samples, a teacher per domain scores every token."""

    revision = 1
    writes = "model"
    uses = (
        "sources/student",
        "engines/transformers",
        "teachers/local",
        "rewards/verifier",
        "rewards/model",
    )

    @dataclass(kw_only=True)
    class Config(OnPolicyConfig):
        """Keys of an opd stage."""

        teachers: dict[str, Teacher] = key({}, "NAME: a reference, or {model, serves, weight}")
        pooled: bool = key(
            False, "all teachers of a domain on every sample, summed by weight; else one each"
        )
        reference: str | None = key(
            None,
            "frozen model that a signal measures from: policy (the student's start), or a base",
            ref=True,
            neutral=True,
        )
        template: str | None = key(
            None,
            "model whose chat template the student is prompted by, and keeps: the teacher's own",
            ref=True,
            neutral=True,
        )
        sources: dict = key(
            {}, "where responses come from; empty is the student", family="sources", neutral=True
        )
        loss_temperature: float = key(
            0.0, "divides the logits in the loss; 0 is as sampled", least=0.0, neutral=True
        )
        signals: dict = key({"reverse_kl": {}}, "what the advantage is made of", family="signals")
        objectives: dict = key(
            {"policy_gradient": {"weights": {"is_gate": {}}}},
            "what is minimised",
            family="objectives",
        )

    @staticmethod
    def problems(config, recipe, stage, alone=False):
        """What the schema cannot see.

        Args:
            alone: objectives are looked at one by one, never summed.
        """
        local = member("teachers", "local").provides
        provided = set(local) if config.teachers else set()
        for own in (n for t in config.teachers.values() for n in t.scored_by):
            provided &= set(member("teachers", own).provides)
        if config.reference:
            provided |= {n.replace("teacher.", "reference.") for n in local}
        found = needs_domains(recipe, stage) + member_problems(config, provided)
        found += _unused_reference(config)
        found += source_problems(config, recipe) + combination_problems(config, alone)
        found += _served(config) + _addresses(config) + _widths(config, recipe, stage)
        return found + _routing(config, recipe, stage) + _tokenizers(config)

    @staticmethod
    def notes(config):
        """What is allowed and has no effect."""
        found, rewarded = cannot_act(config), config.signals.get("outcome")
        own = all(t.model in ("policy", config.student) for t in config.teachers.values())
        if config.teachers and own and not (rewarded and rewarded.coef):
            what = "each is the student's own start: there is nothing to learn"
            found.append(Problem("teachers", what, "teachers: {DOMAIN: REF}"))
        return found

    def run(self, ctx):
        """Load the start, train, write the output."""
        from opdctl.train.assemble import on_policy
        from opdctl.train.loop import train

        model = ctx.aligned(ctx.student())
        return train(ctx, model, lambda ctx, model: on_policy(ctx, model, ctx.config.teachers))


def _served(config) -> list[Problem]:
    """What is asked of a teacher that is behind a server, and it cannot give."""
    names = {n: t.model for n, t in config.teachers.items() if _form(t.model) == "server"}
    if not names:
        return []
    who = " and ".join(f"{name} ({ref})" for name, ref in names.items())
    provides = member("teachers", "server").provides
    active = {n: s for n, s in config.signals.items() if s.coef}
    found = []
    for path, keys in in_use(config, active).items():
        if path.startswith("sources."):
            continue  # it says for itself whether it can sample from a server
        needs = needs_of(member(*path.split(".")[-2:]), keys)
        lacking = [
            n for n in needs if n.startswith("teacher.") and parse_need(n)[0] not in provides
        ]
        if lacking:
            what = f"needs {lacking[0]}, and teacher {who} is behind a server, which gives "
            what += f"{', '.join(provides)} alone"
            found.append(Problem(path, what, _instead(keys)))
    key = "loss_temperature" if config.loss_temperature else "sampling.temperature"
    if (config.loss_temperature or config.sampling.temperature) != 1.0:
        what = f"teacher {who} is behind a server, whose log-probs are those at temperature 1"
        found.append(Problem(key, what, f"{key.split('.')[-1]}=1.0, or a folder"))
    return found


def _widths(config, recipe, stage) -> list[Problem]:
    """States of two widths, where the sizes of both models are known without loading them."""

    def width(reference: str) -> int:
        shape = None if _form(reference) == "server" else shape_of(recipe, reference, stage)
        return shape.hidden if shape else 0  # 0 is not known

    found = _ranks(config, recipe, stage)
    for name, objective in config.objectives.items():
        hint = getattr(member("objectives", name), "same_width", "")
        for teacher, keys in config.teachers.items() if objective.coef and hint else ():
            ours, theirs = width(config.student), width(keys.model)
            if ours and theirs and ours != theirs:
                what = f"compares states of width {ours}, and those of teacher {teacher} "
                what += f"({keys.model}) are {theirs} wide"
                found.append(Problem(f"objectives.{name}", what, hint))
    return found


def _ranks(config, recipe, stage) -> list[Problem]:
    """More directions than a side has numbers, and layers that the student has not."""
    found, known = [], {}
    for ref in (config.student, *(t.model for t in config.teachers.values())):
        shape = None if _form(ref) == "server" else shape_of(recipe, ref, stage)
        known[ref] = shape
    for name, objective in config.objectives.items():
        if not objective.coef:
            continue
        rank = getattr(objective, "rank", 0)
        narrow = min((s.hidden for s in known.values() if s and s.hidden), default=0)
        if narrow and rank > narrow:
            what = f"{rank} directions, and a side has {narrow} numbers"
            found.append(Problem(f"objectives.{name}.rank", what, f"rank={min(8, narrow)}"))
        layers, student = getattr(objective, "layers", ""), known[config.student]
        depth = student.layers if student else 0
        if isinstance(layers, list) and depth and max(layers, default=0) > depth:
            what = f"{layers}, and the student has the layers 1 to {depth}"
            found.append(Problem(f"objectives.{name}.layers", what, "layers: all, last, even, odd"))
    return found


def _unused_reference(config) -> list[Problem]:
    """A reference that is loaded for nothing."""
    active = {n: s for n, s in config.signals.items() if s.coef}
    named = [(member(*p.split(".")[-2:]), k) for p, k in in_use(config, active).items()]
    asked = [n for cls, keys in named if hasattr(cls, "needs") for n in needs_of(cls, keys)]
    if not config.reference or any(n.startswith("reference.") for n in asked):
        return []
    hint = "signals: {extrapolation: {}}, or leave it out"
    return [Problem("reference", "nothing here measures from it", hint)]


def _addresses(config) -> list[Problem]:
    """Another address of what is behind none, or one that is none."""
    found = []
    for name, teacher in config.teachers.items():
        path = f"teachers.{name}.at"
        if teacher.at and _form(teacher.model) != "server":
            what = f"{teacher.model} is not behind a server"
            found.append(Problem(path, what, f"teachers.{name}.model=http://host:8000"))
        elif teacher.at and (_form(teacher.at) != "server" or "#" in teacher.at):
            what = f"{teacher.at!r} is no address; the model's name stands in model"
            found.append(Problem(path, what, f"{path}=http://host:8000"))
        path = f"teachers.{name}.scored_by"
        if len(teacher.scored_by) > 1:
            found.append(Problem(path, f"{list(teacher.scored_by)} given", "one at most"))
        elif teacher.scored_by and _form(teacher.model) == "server":
            what = f"{teacher.model} is behind a server, which opdctl asks itself"
            found.append(Problem(path, what, "leave it out, or a folder as the model"))
    return found


def _instead(keys) -> str:
    """What a server can give in place of what a member asks for."""
    if hasattr(keys, "support"):
        return "support=topk_teacher, whose ids a server lists, or a folder"
    if hasattr(keys, "over"):
        return "over=listed, or a folder"
    return "signals: {reverse_kl: {}} and objectives: {policy_gradient: {}}, or a folder"


def _form(text: str) -> str:
    return references.parse(text).form


def _routing(config, recipe, stage) -> list[Problem]:
    domains = recipe.domains(stage)
    found = [
        Problem(f"teachers.{name}.serves", "it serves no domain", "serves: {DOMAIN: true}")
        for name, teacher in config.teachers.items()
        if teacher.serves and not any(teacher.serves.values())
    ]
    if not config.teachers:
        return found
    for domain, names in routes(domains, config.teachers).items():
        if domain not in domains:
            near = did_you_mean(domain, domains, "domains of this stage:")
            found.append(
                Problem(
                    f"teachers.{names[0]}",
                    f"no prompt here is of {domain!r}",
                    f"{near}; or say what it serves: serves: {{DOMAIN: true}}",
                )
            )
        elif not names:
            found.append(
                Problem(
                    "teachers",
                    f"no teacher for the domain {domain!r}",
                    f"teachers: {{{domain}: REF}}, or policy to keep it as it is",
                )
            )
        elif len(names) > 1 and not config.pooled:
            found.append(
                Problem(
                    "teachers",
                    f"{' and '.join(names)} both serve {domain!r}",
                    "one teacher per domain, or pooled: true",
                )
            )
    return found


def _tokenizers(config) -> list[Problem]:
    """Folders can be compared without loading a model; stages are compared when they run."""
    student = references.parse(config.student)
    ours = references.vocabulary(student.name) if student.form == "folder" else None
    found = []
    for name, teacher in config.teachers.items():
        ref = references.parse(teacher.model)
        theirs = references.vocabulary(ref.name) if ref.form == "folder" else None
        if ours and theirs:
            difference = references.first_difference(ours, theirs)
            if difference:
                found.append(
                    Problem(
                        f"teachers.{name}",
                        f"{Path(ref.name)} has another tokenizer than the student: {difference}",
                        "use a teacher of the same tokenizer, or its texts: "
                        "opdctl stage sft with sources.teacher",
                    )
                )
    return found
