"""The bug list, third part: what recipes, checkpoints and resumes elsewhere did wrong and said
nothing of.

See test_known_failures.py.
"""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from one_step import First, opd, prompts, refused
from safetensors.torch import load_file, save_file

import opdctl
from opdctl.config.describe import describe
from opdctl.config.registry import FAMILIES, member, members
from opdctl.config.settings import Runtime, Teacher
from opdctl.errors import Interrupted, RecipeError, StageFailed, UsageError
from opdctl.models.model import load, save
from opdctl.recipe.recipe import load as read
from opdctl.recipe.recipe import lookup
from opdctl.recipe.source import shipped
from opdctl.run.rundir import RunDir, read_rows
from opdctl.scoring.teachers.local import Local
from opdctl.stages.merge import Ingredient
from opdctl.train.context import Context
from running import carry_out, one_stage

STOP_AT = 2  # of four steps of three prompts: where the epoch of six prompts ends


class Stopped(Context):
    """A stage that is asked to stop once so many steps are done."""

    def check(self):
        self.stop = len(read_rows(self.folder / "metrics.jsonl")) >= STOP_AT
        super().check()


@pytest.fixture(scope="module")
def pair(on_disk, tmp_path_factory):
    """Contexts of one stage run through, and stopped and resumed, both done."""
    folder = tmp_path_factory.mktemp("resumed")
    keys = {"steps": 4, "prompts": {"per_step": 3, "pool": 6}, "optim": {"lr": 1e-2}}
    keys["runtime"] = {"checkpoint_every": 50, "log_rollouts_every": 1}
    whole, stopped = (opd(on_disk, folder, context=c, **keys) for c in (Context, Stopped))
    carry_out(whole)
    with pytest.raises(Interrupted):
        carry_out(stopped)
    resumed = Context(stopped.run, stopped.recipe, "it", attempt=2)
    carry_out(resumed)
    return whole, resumed


def asked(ctx):
    """The prompts of each step."""
    files = sorted((ctx.folder / "rollouts").glob("*.jsonl"))
    return [[json.loads(line)["prompt"] for line in f.read_text().splitlines()] for f in files]


# Resume


def test_resume_starts_from_the_initial_weights(pair):
    """open-instruct's --resume_from_checkpoint was declared and never read; OpenRLHF #1103.

    Nor from new moments of the optimizer (a warning in AsyncOPD): the output is the same bits.
    """
    ours, theirs = (load_file(c.folder / "output" / "model.safetensors") for c in pair)
    start = load_file(Path(pair[0].config.student) / "model.safetensors")
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert any((ours[n] - start[n]).abs().max() > 1e-2 for n in ours)


def test_data_restarts_or_skips_at_an_epoch_boundary(pair):
    """verl #3457 and #4156, NeMo-RL #2519, prime-rl #3332, open-instruct #1523."""
    whole, resumed = map(asked, pair)
    assert resumed == whole
    epochs = [whole[0] + whole[1], whole[2] + whole[3]]
    assert [len(set(e)) for e in epochs] == [6, 6] and set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


def test_resume_at_an_epoch_boundary_does_nothing_and_calls_it_success(pair):
    """verl #5725 exits 0 after zero steps."""
    rows = read_rows(pair[1].folder / "metrics.jsonl")
    assert [(r["step"], r["attempt"]) for r in rows] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_rollouts_of_stale_weights(pair):
    """TRL #3185: the engine samples with whatever weights it holds, after a resume above all."""
    for ctx in pair:
        rows = read_rows(ctx.folder / "metrics.jsonl")
        assert all(abs(r["ratio"] - 1) < 1e-4 for r in rows) and rows[-1]["grad_norm"] > 1e-3


# Teachers


@pytest.mark.parametrize("name", ["teacher_model", "teacher", "default", "policy"])
def test_a_routing_key_is_dropped(stage, on_disk, name):
    """verl drops the teacher called teacher_model when there are others."""
    teachers = {"sums": str(on_disk / "t"), name: str(on_disk / "u")}
    problem = refused(stage, teachers=teachers)
    assert problem.path == f"stages.it.teachers.{name}" and "no prompt here" in problem.message
    data = dict.fromkeys(teachers, prompts(on_disk))
    first = First(stage(data=data, teachers=teachers))
    assert {(r.prompt.domain, r.teacher) for r in first.rollouts} == {(n, n) for n in teachers}


def test_an_unknown_domain_falls_back_to_a_mix(stage, on_disk):
    """Open-MOPD: a domain without a teacher is taught by all of them alike."""
    data = {"sums": prompts(on_disk), "other": prompts(on_disk)}
    problem = refused(stage, data=data, teachers={"sums": str(on_disk / "t")})
    assert "no teacher for the domain 'other'" in problem.message
    problem = refused(stage, prompts={"domains": {"smus": 1}})
    assert "did you mean 'sums'" in problem.hint


def test_a_failure_of_the_teacher_becomes_zeros(stage, on_disk, tmp_path):
    """training-gym #155. Ours names the rollout, and nothing is written."""
    broken = load(on_disk / "t")
    with torch.no_grad():
        broken.net.model.norm.weight[:] = 3e38  # finite, and its logits are not
    save(broken, tmp_path / "broken")
    ctx = stage(teacher=tmp_path / "broken")
    with pytest.raises(StageFailed, match=r"not finite in the rollout of prompt \w+ \(sums\)"):
        carry_out(ctx)
    assert not (ctx.folder / "output").exists()


def test_a_teacher_that_answers_short(stage, monkeypatch):
    """ms-swift #9671: a served teacher out of step with the response, unnoticed. Ours fails."""
    whole = Local.score

    def short(self, requests, *rest):
        scores = whole(self, requests, *rest)
        scores.per_token["logprobs"] = scores.per_token["logprobs"][:-1]
        return scores

    monkeypatch.setattr(Local, "score", short)
    with pytest.raises(StageFailed, match=r"scored \d+ of \d+ tokens, from the rollout of prompt"):
        carry_out(stage())


def test_a_teacher_with_another_end_token(stage, on_disk, tmp_path):
    """ms-swift: base and instruct differ in it, and length explodes."""
    other = load(on_disk / "t")
    other.tokenizer.eos_token = "="
    save(other, tmp_path / "t")
    with pytest.raises(UsageError, match="ends a response by"):
        First(stage(teacher=tmp_path / "t"))


def test_the_teacher_is_the_student(stage, on_disk):
    """miles: KL of zero, and a run that looks well. Ours notes it before anything runs."""
    for teacher in ("policy", "s"):
        (note,) = stage(teacher=teacher).recipe.notes()
        assert note.path == "stages.it.teachers" and "nothing to learn" in note.message
    assert not stage().recipe.notes()


# Models


def test_a_part_of_a_model_loads_the_base(stage, on_disk, tmp_path, monkeypatch):
    """miles: an iter folder inside a checkpoint falls back to the base model, KL zero."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(on_disk / "t", "model")
    Path("model/iter_20").mkdir()
    shutil.copy(on_disk / "t" / "model.safetensors", "model/iter_20")
    for part in ("model/iter_20", "./model/iter_20", "model/iter_30"):
        problem = refused(stage, teachers={"teacher": part})
        assert problem.path == "stages.it.teachers.teacher.model"
        assert problem.hint == f"the model is in {tmp_path / 'model'}"


@pytest.mark.parametrize("keep", ["model.embed", "model.layers.0"])
def test_weights_that_are_missing_are_random(stage, on_disk, tmp_path, keep):
    """transformers fills them up, with a warning; a renamed or cut checkpoint loads as noise."""
    shutil.copytree(on_disk / "t", tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    some = {n: t for n, t in load_file(path).items() if n.startswith(keep)}
    save_file(some, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks \d+ weights, such as|more than the weights"):
        carry_out(stage(student=tmp_path / "cut"))


def test_bf16_parameters_round_the_steps_away(stage):
    """A fork of thunlp/OPD: at lr 1e-6 bf16 weights do not move. There the optimizer moves float32
    copies; without them it is refused, and noted above 1e-5. See test_precision.py."""
    runtime = {"dtype": "bfloat16"}
    for lr in (1e-6, 1e-5):
        problem = refused(stage, runtime=runtime | {"master_weights": "none"}, optim={"lr": lr})
        hint = "runtime.master_weights=float32, or runtime.dtype=float32"
        assert problem.path == "runtime.dtype" and problem.hint == hint
        assert f"it ({lr:g})" in problem.message
        assert not stage(runtime=runtime, optim={"lr": lr}).recipe.notes()
    (note,) = stage(runtime=runtime, optim={"lr": 2e-5}).recipe.notes()
    assert note.path == "runtime.dtype" and "it (2e-05)" in note.message
    assert not stage(optim={"lr": 1e-6}).recipe.notes()
    adapter = {"lora": {"rank": 2}, "optim": {"lr": 1e-6}}  # in float32, whatever its base is
    assert not stage(runtime=runtime | {"master_weights": "none"}, **adapter).recipe.notes()


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_recipe_rounds_its_steps_away_or_never_checkpoints(name):
    """ROLL saves every 10000 of 1024 steps; ms-swift's examples save what cannot be resumed."""
    for size in ("small", "lab"):
        recipe = read(name, size=size)
        steps = [recipe.total(s) for s, c in recipe.stages.items() if c.steps]
        assert steps and recipe.runtime.checkpoint_every < min(steps)
        assert not [n for n in recipe.notes() if n.path == "runtime.dtype"]


# Keys


@pytest.mark.parametrize(
    "key",
    [
        "stages.it.signals.outcome.orm_advantage_weight=1",
        "stages.it.use_orm_advantage=true",
        "trainer.ref.mode.path=x",
        "runtime.resume_from_checkpoint=x",
        "stages.it.teachers.teacher.temperature=1",
    ],
)
def test_a_key_that_does_not_exist_is_accepted(stage, key):
    """NeMo-RL's ORM keys, SkyRL's README, torchtune's validate."""
    with pytest.raises(RecipeError) as caught:
        stage("stages.it.signals.outcome.baseline=none", key)
    assert [p.path for p in caught.value.problems if p.message == "unknown key"]


def test_a_key_that_nothing_reads():
    """open-instruct's flag, tinker-cookbook's temperature: declared, documented, without effect.

    By name: one that is read under another object of the same attribute would pass.
    """
    trees = [ast.parse(p.read_text()) for p in Path(opdctl.__file__).parent.rglob("*.py")]
    nodes = [n for tree in trees for n in ast.walk(tree)]
    known = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    known |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    configs = [Runtime, Teacher, Ingredient]
    for family in set(FAMILIES) - {"claims"}:  # a claim's keys are roles, read as a mapping
        classes = [member(family, name) for name in members(family)]
        configs += [c.Config for c in classes if hasattr(c, "Config")]
    keys = {row["key"].rsplit(".", 1)[-1] for c in configs for row in describe(c, lookup)}
    assert len(keys) > 80 and not keys - known


# Rollouts


def test_an_end_token_is_put_after_a_truncated_response(stage):
    """KDFlow re-tokenises the text and appends one always. Ours keep the very ids sampled."""
    rollouts = First(stage(sampling={"max_tokens": 2}, prompts={"per_step": 12})).rollouts
    end = load(stage().config.student).eos
    cut = [r for r in rollouts if r.truncated]
    assert cut and all(len(r.response_ids) == 2 and end not in r.response_ids for r in cut)
    assert all(len(r.behaviour_logprobs) == r.length for r in rollouts)


def test_a_step_without_samples_is_nan_or_success(on_disk, tmp_path):
    """A mean over no token. A step without samples changes nothing; a stage without any fails."""
    source = {"teacher": {"model": str(on_disk / "t"), "sampling": {"max_tokens": 3}}}
    sft = {"kind": "sft", "student": str(on_disk / "s"), "steps": 2, "sources": source}
    ctx = one_stage(tmp_path / "run", {"sums": prompts(on_disk, "long")}, **sft)
    with pytest.raises(StageFailed, match="no step had anything to train on"):
        carry_out(ctx)
    rows = read_rows(RunDir(tmp_path / "run").stage("it") / "metrics.jsonl")
    assert [r["rollouts"] for r in rows] == [0, 0] and not any("loss" in r for r in rows)


def test_a_group_of_one_has_no_advantage(stage):
    """The outcome of a group of one less the mean of its group is zero in every step."""
    problem = refused(stage, signals={"outcome": {}})
    assert problem.path == "stages.it.prompts.samples" and "group of one" in problem.message
