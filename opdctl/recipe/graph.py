"""The checks of a recipe's graph: references, cycles, domains, kinds; all problems collected.

The schema has passed. Nothing is loaded: of a model folder only config.json and the tokenizer's
vocabulary are read.
"""

from __future__ import annotations

import dataclasses
import datetime
import graphlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from opdctl.config import references, registry
from opdctl.config.schema import did_you_mean
from opdctl.config.schema import references as refs_of
from opdctl.config.settings import ROUNDED_AWAY, Lora
from opdctl.errors import Problem


def check(recipe: Any, folders: bool) -> list[Problem]:
    """Return every problem of the graph. References are replaced by what their aliases mean.

    Args:
        folders: whether the folders and files it names must exist; a run may outlive them.
    """
    problems = _aliases(recipe, folders)
    for stage in recipe.stages:
        problems += _references(recipe, stage, folders)
    problems += _data(recipe, folders) + _judges(recipe, folders)
    if problems:
        return problems
    try:
        graphlib.TopologicalSorter({s: recipe.upstream(s) for s in recipe.stages}).prepare()
    except graphlib.CycleError as error:
        trail = " -> ".join(reversed(error.args[1]))
        hint = "a stage reads only what comes before it"
        return [Problem(f"stages.{error.args[1][0]}", f"a cycle of stages: {trail}", hint)]
    for stage, config in recipe.stages.items():
        cls = registry.member("stages", config.kind)
        for problem in cls.problems(config, recipe, stage):
            problems.append(replace(problem, path=f"stages.{stage}.{problem.path}"))
    for claim, roles in recipe.claims.items():
        problems += _claim(recipe, claim, roles)
    problems += _adapters(recipe) + _merged_away(recipe) + _engine(recipe)
    problems += _date(recipe.runtime.template_date)
    return problems + rounding(recipe, lost=True)


def _date(text: str) -> list[Problem]:
    """Return why a text is no date."""
    try:
        datetime.datetime.fromisoformat(text or "2000-01-01")
    except ValueError:
        message = f"{text!r} is no date in ISO's form"
        return [Problem("runtime.template_date", message, "runtime.template_date=2026-01-31")]
    return []


def _engine(recipe: Any) -> list[Problem]:
    """Return what the chosen engine cannot do."""
    runtime = recipe.runtime
    if runtime.engine_args and runtime.engine == "transformers":
        message = "the engine is transformers, which takes none"
        return [Problem("runtime.engine_args", message, "runtime.engine=vllm, or leave them out")]
    if runtime.engine_at and runtime.engine != "vllm_server":
        message = f"the engine is {runtime.engine}, which is in the stage's process"
        hint = "runtime.engine=vllm_server, or leave it out"
        return [Problem("runtime.engine_at", message, hint)]
    return registry.member("engines", runtime.engine).problems(recipe)


def rounding(recipe: Any, lost: bool) -> list[Problem]:
    """Return the problem of steps that parameters in bfloat16 round away, with the stages it is of.

    An adapter is in float32; the score beside that of an outcome model is not.

    Args:
        lost: name the stages that lose most of a step; else those that lose only small ones.
    """
    rates = {
        stage: config.optim.lr
        for stage, config in recipe.stages.items()
        if config.optim is not None
        and not recipe.runtime.masters_of(config.optim.lr)
        and not (config.lora.rank and config.kind != "orm")
    }
    named = [f"{s} ({lr:g})" for s, lr in rates.items() if (lr <= ROUNDED_AWAY) == lost]
    if recipe.runtime.dtype != "bfloat16" or not named:
        return []
    message = "rounds most of a step away" if lost else "rounds small steps away"
    message = f"a parameter in bfloat16 {message}, with the optim.lr of {', '.join(named)}"
    return [
        Problem(
            "runtime.dtype", message, "runtime.master_weights=float32, or runtime.dtype=float32"
        )
    ]


def _adapters(recipe: Any) -> list[Problem]:
    """Return the keys of an adapter where there is none."""
    return [
        Problem(
            f"stages.{stage}.lora.rank",
            "0 is no adapter, and other keys of lora are set",
            "lora.rank=16, or leave the others out",
        )
        for stage, config in recipe.stages.items()
        if not config.lora.rank and config.lora != Lora()
    ]


def _merged_away(recipe: Any) -> list[Problem]:
    """Return the stages of a bfloat16 run that read a merged adapter, and would round it away."""
    if recipe.runtime.dtype != "bfloat16":
        return []
    problems = []
    for stage in recipe.stages:
        for dotted, text in recipe.references(stage):
            read = references.parse(text)
            if read.form != "stage" or dotted.endswith(".reward"):  # that is read in float32
                continue
            config = recipe.stages[read.name]
            lora = getattr(config, "lora", Lora())
            if lora.rank and lora.output == "merged" and config.kind != "orm":
                message = (
                    f"its weights are float32, and stage {stage} reads them in bfloat16, which "
                )
                message += "rounds away what the adapter added"
                hint = "lora.output=adapter, or runtime.dtype=float32"
                problems.append(Problem(f"stages.{read.name}.lora.output", message, hint))
    return list(dict.fromkeys(problems))


def _aliases(recipe, folders: bool) -> list[Problem]:
    problems = []
    for alias, text in recipe.models.items():
        wrong = references.complaint(text, list(recipe.stages), [], folders)
        if wrong:
            problems.append(Problem(f"models.{alias}", *wrong))
    return problems


def _references(recipe, stage: str, folders: bool) -> list[Problem]:
    config, problems = recipe.stages[stage], []
    names, aliases = list(recipe.stages), list(recipe.models)
    for dotted, text in refs_of(config):
        target = recipe.models.get(text, text)
        reference = references.parse(target)
        _set(config, dotted, str(reference))
        rewarding = dotted.endswith(".reward")
        if rewarding and target == "verifier":
            continue
        wrong = references.complaint(target, names, aliases, folders)
        if wrong is None and reference.form == "stage" and reference.name == stage:
            wrong = "a stage cannot read its own output", ""
        if wrong is None and reference.form == "policy" and not _frozen(dotted):
            wrong = "policy is a teacher's reference", "write stage:NAME"
        if wrong is None and reference.form == "server" and not _taught(dotted):
            wrong = "a model behind a server cannot be loaded", "a stage, a folder or a public name"
        if wrong is None:
            wrong = _kind(recipe, reference, "classifier" if rewarding else "model", folders)
        if wrong:
            problems.append(Problem(f"stages.{stage}.{dotted}", *wrong))
    for domain, share in (config.prompts.domains if config.prompts else {}).items():
        path = f"stages.{stage}.prompts.domains.{domain}"
        if domain not in recipe.data:
            near = did_you_mean(domain, recipe.data, "data:")
            problems.append(Problem(path, f"no data {domain!r}", near))
        if isinstance(share, float) and not 0 <= share < float("inf"):
            problems.append(Problem(path, f"a share is 0 or more, not {share}"))
    return problems


def _frozen(dotted: str) -> bool:
    """Return whether a key of a stage names a model that may be the student's own start."""
    return dotted == "reference" or ".teachers." in f".{dotted}"


def _judges(recipe, folders: bool) -> list[Problem]:
    """Check the models that verifiers name; a stage's is an edge to every stage of the domain."""
    problems = []
    for domain, config in recipe.data.items():
        verifier = config.verifier
        for dotted, text in refs_of(verifier):
            target = recipe.models.get(text, text)
            reference = references.parse(target)
            _set(verifier, dotted, str(reference))
            names, aliases = list(recipe.stages), list(recipe.models)
            wrong = references.complaint(target, names, aliases, folders)
            if wrong is None and reference.form == "policy":
                wrong = "policy is a teacher's reference", "write stage:NAME"
            wrong = wrong or _kind(recipe, reference, "model", folders)
            if wrong:
                problems.append(Problem(f"data.{domain}.verifier.{dotted}", *wrong))
    return problems


def _taught(dotted: str) -> bool:
    """Return whether a key names a teacher: of scores, or of texts."""
    return dotted.startswith(("teachers.", "sources.teacher."))


def _kind(recipe, reference, wanted: str, folders: bool) -> tuple[str, str] | None:
    """Return message and hint where a reference is of another kind of model than is read."""
    hint = (
        "an orm stage writes a classifier; pretrain, sft, rl, opd and merge write a language model"
    )
    written = wanted
    if reference.form == "stage":
        written = registry.member("stages", recipe.stages[reference.name].kind).writes
    elif reference.form == "folder" and folders:
        written = references.written_in(reference.name)
    if written == wanted:
        return None
    return f"{reference} writes {written or 'no model'}, and a {wanted} is read here", hint


def _data(recipe, folders: bool) -> list[Problem]:
    problems = []
    for domain, config in recipe.data.items():
        path = config.path
        place = os.path.expanduser(path)
        if path and (config.kind == "jsonl" or os.path.exists(place)):
            config.path = str(Path(place).absolute())
        check = registry.member("data", config.kind).problems
        wrong = config.common_problems() + _verifier(config) + _columns(config)
        wrong += check(config) if folders else []
        problems += [replace(p, path=f"data.{domain}.{p.path}") for p in wrong]
    return problems


def _columns(config) -> list[Problem]:
    """Return the columns that nothing reads beside others."""
    turns = config.messages_column
    if turns and config.thought_column:
        message = "a conversation's thinking stands in its turns: messages_column is read, not this"
        return [
            Problem("thought_column", message, "leave it out, or prompt_column for messages_column")
        ]
    if config.tools_column and not turns:
        message = "tools belong to a conversation, and there is no messages_column"
        return [Problem("tools_column", message, "messages_column=messages, or leave it out")]
    return []


def _verifier(config) -> list[Problem]:
    """Check that a table has one verifier, and the columns that it reads."""
    if registry.member("data", config.kind).procedural:
        return []  # the kind brings its own
    if len(config.verifier) != 1:
        return [Problem("verifier", f"{list(config.verifier)} given", "one: verifier: math")]
    ((name, keys),) = config.verifier.items()
    cls = registry.member("verifiers", name)
    problems = [replace(p, path=f"verifier.{name}.{p.path}") for p in cls.problems(keys)]
    if cls.needs_answer(keys) and not config.answer_column:
        message = f"the verifier {name} compares with a reference answer"
        problems.append(
            Problem("answer_column", message, "answer_column: the column that holds it")
        )
    return problems


def _claim(recipe, claim: str, roles) -> list[Problem]:
    problems = []
    for dotted, text in refs_of(roles):
        wrong = references.complaint(text, list(recipe.stages), [])
        if wrong is None and references.parse(text).form != "stage":
            wrong = "a claim names stages", "write stage:NAME"
        if wrong:
            problems.append(Problem(f"claims.{claim}.{dotted}", *wrong))
    for f in dataclasses.fields(roles):
        value, path = getattr(roles, f.name), f"claims.{claim}.{f.name}"
        groups = [value]
        if isinstance(value, dict) and all(isinstance(v, dict) for v in value.values()):
            groups = list(value.values()) or [{}]
        for group in groups:
            if isinstance(group, dict) and not any(group.values()):
                problems.append(Problem(path, "names nothing", f.metadata["doc"]))
            for domain in _domains(group) if f.metadata["domains"] else ():
                if domain not in recipe.data:
                    near = did_you_mean(domain, recipe.data, "data:")
                    problems.append(Problem(path, f"no domain {domain!r}", near))
    wrong = registry.member("claims", claim.lower()).problems(roles)
    return problems + [replace(p, path=f"claims.{claim}.{p.path}") for p in wrong]


def _domains(group: str | dict) -> list[str]:
    return [group] if isinstance(group, str) else list(group)


def _set(config: Any, dotted: str, value: str) -> None:
    *above, last = dotted.split(".")
    for part in above:
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    if isinstance(config, dict):
        config[last] = value
    else:
        setattr(config, last, value)
