"""On-policy distillation: the student samples, and a teacher's scores are the tokens' advantages.

The teacher of the prompt's domain scores every token; with one teacher per domain this is MOPD.
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
from opdctl.config.schema import did_you_mean, has_key, key
from opdctl.config.settings import Teacher, routes
from opdctl.errors import Problem
from opdctl.estimate.shape import shape_of
from opdctl.stages._combinations import combination_problems, source_problems
from opdctl.stages._stage import Stage
from opdctl.stages.rl import OnPolicyConfig, active_members, ineffective_keys, member_problems
from opdctl.stages.sft import domain_problems


class Opd(Stage):
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
        """The keys of an opd stage."""

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
        """Return what the schema cannot check of the stage's keys.

        Args:
            alone: objectives are measured one by one, never summed.
        """
        local = member("teachers", "local").provides
        provided = set(local) if config.teachers else set()
        for own in (n for t in config.teachers.values() for n in t.scored_by):
            provided &= set(member("teachers", own).provides)
        if config.reference:
            provided |= {n.replace("teacher.", "reference.") for n in local}
        problems = domain_problems(recipe, stage) + member_problems(config, provided)
        problems += _unused_reference(config)
        problems += source_problems(config, recipe) + combination_problems(config, alone)
        problems += (
            _beyond_servers(config)
            + _wrong_addresses(config)
            + _unequal_widths(config, recipe, stage)
        )
        return problems + _routing(config, recipe, stage) + _different_tokenizers(config)

    @staticmethod
    def notes(config):
        """Return keys that are allowed and have no effect."""
        notes, rewarded = ineffective_keys(config), config.signals.get("outcome")
        own = all(t.model in ("policy", config.student) for t in config.teachers.values())
        if config.teachers and own and not (rewarded and rewarded.coef):
            message = "each is the student's own start: there is nothing to learn"
            notes.append(Problem("teachers", message, "teachers: {DOMAIN: REF}"))
        return notes

    def run(self, ctx):
        """Load the start, train, write the output."""
        from opdctl.train.assemble import on_policy
        from opdctl.train.loop import train

        model = ctx.models.aligned(ctx.models.student())
        return train(ctx, model, lambda ctx, model: on_policy(ctx, model, ctx.config.teachers))


def _beyond_servers(config) -> list[Problem]:
    """Return needs of members that a teacher behind a server cannot meet."""
    names = {n: t.model for n, t in config.teachers.items() if _form(t.model) == "server"}
    if not names:
        return []
    who = " and ".join(f"{name} ({ref})" for name, ref in names.items())
    provides = member("teachers", "server").provides
    active = {n: s for n, s in config.signals.items() if s.coef}
    problems = []
    for path, keys in active_members(config, active).items():
        if path.startswith("sources."):
            continue  # a source's own problems say whether it can sample from a server
        needs = needs_of(member(*path.split(".")[-2:]), keys)
        lacking = [
            n for n in needs if n.startswith("teacher.") and parse_need(n)[0] not in provides
        ]
        if lacking:
            message = f"needs {lacking[0]}, and teacher {who} is behind a server, which gives "
            message += f"{', '.join(provides)} alone"
            problems.append(Problem(path, message, _server_alternative(keys)))
    key = "loss_temperature" if config.loss_temperature else "sampling.temperature"
    if (config.loss_temperature or config.sampling.temperature) != 1.0:
        message = f"teacher {who} is behind a server, whose log-probs are those at temperature 1"
        problems.append(Problem(key, message, f"{key.split('.')[-1]}=1.0, or a folder"))
    return problems


def _unequal_widths(config, recipe, stage) -> list[Problem]:
    """Return objectives that compare states of different widths, for models of known sizes."""

    def width(reference: str) -> int:
        shape = None if _form(reference) == "server" else shape_of(recipe, reference, stage)
        return shape.hidden if shape else 0  # 0 is not known

    problems = _excess_ranks_and_layers(config, recipe, stage)
    for name, objective in config.objectives.items():
        hint = member("objectives", name).same_width
        for teacher, keys in config.teachers.items() if objective.coef and hint else ():
            ours, theirs = width(config.student), width(keys.model)
            if ours and theirs and ours != theirs:
                message = f"compares states of width {ours}, and those of teacher {teacher} "
                message += f"({keys.model}) are {theirs} wide"
                problems.append(Problem(f"objectives.{name}", message, hint))
    return problems


def _excess_ranks_and_layers(config, recipe, stage) -> list[Problem]:
    """Return objectives with more directions than a state has numbers, or with unknown layers."""
    problems, known = [], {}
    for ref in (config.student, *(t.model for t in config.teachers.values())):
        shape = None if _form(ref) == "server" else shape_of(recipe, ref, stage)
        known[ref] = shape
    for name, objective in config.objectives.items():
        if not objective.coef:
            continue
        rank = objective.rank
        narrow = min((s.hidden for s in known.values() if s and s.hidden), default=0)
        if narrow and rank > narrow:
            message = f"{rank} directions, and a side has {narrow} numbers"
            problems.append(Problem(f"objectives.{name}.rank", message, f"rank={min(8, narrow)}"))
        layers, student = objective.layers, known[config.student]
        depth = student.layers if student else 0
        if isinstance(layers, list) and depth and max(layers, default=0) > depth:
            message = f"{layers}, and the student has the layers 1 to {depth}"
            hint = "layers: all, last, even, odd"
            problems.append(Problem(f"objectives.{name}.layers", message, hint))
    return problems


def _unused_reference(config) -> list[Problem]:
    """Return a problem if the reference is used by no active member."""
    active = {n: s for n, s in config.signals.items() if s.coef}
    named = [(member(*p.split(".")[-2:]), k) for p, k in active_members(config, active).items()]
    needs = [n for cls, keys in named for n in needs_of(cls, keys)]
    if not config.reference or any(n.startswith("reference.") for n in needs):
        return []
    hint = "signals: {extrapolation: {}}, or leave it out"
    return [Problem("reference", "nothing here measures from it", hint)]


def _wrong_addresses(config) -> list[Problem]:
    """Return addresses of teachers that have none, and texts that are no address."""
    problems = []
    for name, teacher in config.teachers.items():
        path = f"teachers.{name}.at"
        if teacher.at and _form(teacher.model) != "server":
            message = f"{teacher.model} is not behind a server"
            problems.append(Problem(path, message, f"teachers.{name}.model=http://host:8000"))
        elif teacher.at and (_form(teacher.at) != "server" or "#" in teacher.at):
            message = f"{teacher.at!r} is no address; the model's name stands in model"
            problems.append(Problem(path, message, f"{path}=http://host:8000"))
        path = f"teachers.{name}.scored_by"
        if len(teacher.scored_by) > 1:
            problems.append(Problem(path, f"{list(teacher.scored_by)} given", "one at most"))
        elif teacher.scored_by and _form(teacher.model) == "server":
            message = f"{teacher.model} is behind a server, which opdctl asks itself"
            problems.append(Problem(path, message, "leave it out, or a folder as the model"))
    return problems


def _server_alternative(keys) -> str:
    """Return a hint at what a member could use that a server provides."""
    if has_key(keys, "support"):
        return "support=topk_teacher, whose ids a server lists, or a folder"
    if has_key(keys, "over"):
        return "over=listed, or a folder"
    return "signals: {reverse_kl: {}} and objectives: {policy_gradient: {}}, or a folder"


def _form(text: str) -> str:
    return references.parse(text).form


def _routing(config, recipe, stage) -> list[Problem]:
    domains = recipe.domains(stage)
    problems = [
        Problem(f"teachers.{name}.serves", "it serves no domain", "serves: {DOMAIN: true}")
        for name, teacher in config.teachers.items()
        if teacher.serves and not any(teacher.serves.values())
    ]
    if not config.teachers:
        return problems
    for domain, names in routes(domains, config.teachers).items():
        if domain not in domains:
            near = did_you_mean(domain, domains, "domains of this stage:")
            problems.append(
                Problem(
                    f"teachers.{names[0]}",
                    f"no prompt here is of {domain!r}",
                    f"{near}; or say what it serves: serves: {{DOMAIN: true}}",
                )
            )
        elif not names:
            problems.append(
                Problem(
                    "teachers",
                    f"no teacher for the domain {domain!r}",
                    f"teachers: {{{domain}: REF}}, or policy to keep it as it is",
                )
            )
        elif len(names) > 1 and not config.pooled:
            problems.append(
                Problem(
                    "teachers",
                    f"{' and '.join(names)} both serve {domain!r}",
                    "one teacher per domain, or pooled: true",
                )
            )
    return problems


def _different_tokenizers(config) -> list[Problem]:
    """Return teachers in folders whose tokenizer is another; stages are compared when they run."""
    student = references.parse(config.student)
    ours = references.vocabulary(student.name) if student.form == "folder" else None
    problems = []
    for name, teacher in config.teachers.items():
        ref = references.parse(teacher.model)
        theirs = references.vocabulary(ref.name) if ref.form == "folder" else None
        if ours and theirs:
            difference = references.first_difference(ours, theirs)
            if difference:
                problems.append(
                    Problem(
                        f"teachers.{name}",
                        f"{Path(ref.name)} has another tokenizer than the student: {difference}",
                        "use a teacher of the same tokenizer, or its texts: "
                        "opdctl stage sft with sources.teacher",
                    )
                )
    return problems
