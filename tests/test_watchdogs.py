"""Watchdogs: real small stages where that is practical, rows made by hand elsewhere."""

import copy
import json
import math

import pytest
import torch

from conftest import make_model
from opdctl.cli.console import Progress, status_table
from opdctl.config.registry import member, members
from opdctl.config.settings import WATCHDOGS, Optim
from opdctl.errors import UsageError
from opdctl.loss.objectives.nll import Nll
from opdctl.models.model import load as load_model
from opdctl.models.model import save
from opdctl.process.runner import Job
from opdctl.recipe.recipe import load, resolve
from opdctl.recipe.yaml_lines import dump, parse
from opdctl.run.fingerprint import fingerprints, revisions, semantic
from opdctl.run.launch import new_attempt, new_run, reopen
from opdctl.run.rundir import RunDir, read_rows, write_text
from opdctl.run.status import status
from opdctl.scoring.asks import Pass
from opdctl.train import update
from opdctl.train.metrics import Watch
from opdctl.types import ScoreRequest
from running import assert_same, worker

RECIPE = """
name: watched
data:
  math: {kind: reasoning_gym, task: gcd, config: {min_value: 1, max_value: 30}, prompt: "gcd {numbers}="}
stages:
  base: {kind: pretrain, steps: 4, prompts: {per_step: 8}, model: {hidden: 32, intermediate: 64}}
  sft: {kind: sft, student: stage:base, steps: 6, prompts: {per_step: 8}}
  rl: {kind: rl, student: stage:base, steps: 4, prompts: {per_step: 4, samples: 4}, sampling: {max_tokens: 4}}
  opd: {kind: opd, student: stage:base, steps: 5, prompts: {per_step: 8}, sampling: {max_tokens: 4}, teachers: {math: policy}}
  taught: {kind: sft, student: stage:base, steps: 4, prompts: {per_step: 8}, sources: {teacher: {model: stage:base, sampling: {max_tokens: 3}}}}
runtime: {checkpoint_every: 2, log_rollouts_every: 1, log_rollouts: 100}
"""  # noqa: E501


def recipe_with(*overrides):
    tree, lines, problems = parse(RECIPE, "watched.yaml")
    return resolve(tree, "watched.yaml", overrides=overrides, lines=lines, problems=problems)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run whose first stage is done, and a teacher far from every student: sharp and random."""
    folder = tmp_path_factory.mktemp("watch")
    run = new_run(recipe_with(), RECIPE, folder / "run")
    new_attempt(run)
    assert worker(run.path, "base").returncode == 0
    model = load_model(str(run.output("base")))
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.copy_(20 * torch.randn_like(parameter) if parameter.ndim == 2 else parameter)
    save(model, folder / "far")
    return run


def stage(base, tmp_path, name, *overrides, patch=""):
    """Run one stage after ``base``. Returns the run and what the worker gave."""
    import shutil

    run = new_run(recipe_with(*overrides), RECIPE, tmp_path / "run")
    shutil.rmtree(run.stage("base"))
    shutil.copytree(base.stage("base"), run.stage("base"))
    new_attempt(run)
    return run, worker(run.path, name, patch)


def rows(run, name):
    return read_rows(run.stage(name) / "metrics.jsonl")


# rows made by hand -------------------------------------------------------------------------------

ROW = {"rollouts": 8, "tokens": 16, "length": 2.0, "truncated": 0.0}
CASES = [
    ("non_finite", {"skipped": 1, "loss": math.nan, "grad_norm": 1.0}, {"": "loss nan"}),
    ("empty", {"tokens": 0, "rollouts": 0}, {"": "0 rollouts"}),
    ("empty", {"masked": 1.0}, {"": "all 16 tokens are masked"}),
    ("empty", {"gate_open": 0.0}, {"": "none of 16 tokens"}),
    ("kl", {"kl": {"a": 9.5, "b": 0.1}}, {"a": "9.5 nats a token from the teacher, above 5"}),
    ("kl", {"divergence_by_domain": {"a": 6.0}}, {"a": "6 nats"}),
    ("kl", {"student_logprob": -0.5, "teacher_logprob": -8.5}, {"all domains": "8 nats"}),
    ("length", {"length": 0.25}, {"collapse": "0.125 of the first step's 2, below 0.25"}),
    ("length", {"truncated": 0.9}, {"limit": "0.900 of the responses cut at the limit, above"}),
    ("entropy", {"sampled_nll": 1e-5}, {"": "sampled_nll 1e-05 nats a token, below 0.001"}),
    ("reward", {"reward_by_domain": {"a": 0.0, "b": 0.5}}, {"a": "every reward is 0"}),
    ("reward", {"reward_by_domain": {"b": 1.0}}, {"b": "every reward is 1"}),
    ("mismatch", {"logprob_gap": 0.5}, {"": "0.5 nats a token apart, above 0.1"}),
]


@pytest.mark.parametrize(("name", "values", "said"), CASES)
def test_each_speaks_of_what_is_wrong_and_of_nothing_else(name, values, said):
    dog = member("watchdogs", name)(member("watchdogs", name).Config())
    found = dog.look({**ROW, **values}, ROW)
    assert found.keys() == said.keys()
    assert all(text in found[what] for what, text in said.items())
    assert dog.look(ROW, ROW) == {}
    fine = {"kl": {"a": 2.3}, "sampled_nll": 0.005, "gate_open": 0.01, "masked": 0.99}
    fine |= {"reward_by_domain": {"a": 0.99}, "logprob_gap": 1e-5, "truncated": 0.7}
    assert dog.look({**ROW, **fine}, ROW) == {}


def test_every_member_is_on_by_default_and_a_named_one_leaves_the_others():
    assert set(WATCHDOGS) == set(members("watchdogs"))
    watch = recipe_with("stages.sft.watchdogs.kl.most=3").stages["sft"].watchdogs
    assert list(watch) == list(WATCHDOGS)
    assert (watch["kl"].most, watch["kl"].action, watch["non_finite"].action) == (3, "warn", "stop")


def watch_of(**keys):
    watch = (
        recipe_with(*(f"stages.sft.watchdogs.{k}={v}" for k, v in keys.items()))
        .stages["sft"]
        .watchdogs
    )
    return Watch(watch, "sft")


def test_it_waits_speaks_and_speaks_again_when_the_streak_has_doubled():
    watch, spoke = watch_of(**{"kl.steps": 3}), []
    for step in range(1, 20):
        warnings, stop = watch.look(step, {**ROW, "kl": {"a": 0.1 if step == 2 else 9.0}})
        assert stop is None
        spoke += [step] if warnings else []
    assert spoke == [5, 8, 14]  # 3, 6 and 12 in a row from step 3 on
    warnings, _ = watch_of(**{"kl.steps": 1}).look(1, {**ROW, "kl": {"a": 9.0, "b": 8.0}})
    assert [w.split(":")[0] for w in warnings] == ["watchdogs.kl a", "watchdogs.kl b"]


def test_a_streak_is_of_one_domain():
    watch = watch_of(**{"reward.steps": 2})
    for step in range(1, 9):
        assert watch.look(step, {**ROW, "reward_by_domain": {"ab"[step % 2]: 1.0}}) == ([], None)
    warnings, _ = watch.look(9, {**ROW, "reward_by_domain": {"a": 1.0}})
    assert warnings == ["watchdogs.reward a: every reward is 1, 2 steps in a row"]


def test_stop_names_the_number_the_threshold_and_the_key():
    watch = watch_of(**{"kl.steps": 2, "kl.action": "stop"})
    bad = {**ROW, "kl": {"math": 9.0}}
    assert watch.look(1, bad) == ([], None)
    warnings, stop = watch.look(2, bad)
    assert warnings and stop.exit_code == 1
    assert "step 2: watchdogs.kl math: 9 nats a token" in stop.message and "above 5" in stop.message
    assert "stages.sft.watchdogs.kl.action=warn" in stop.hint


def test_what_it_remembers_survives_a_checkpoint():
    bad = {**ROW, "length": 0.1, "truncated": 0.0}
    whole = watch_of(**{"length.steps": 3})
    said = [whole.look(step, ROW if step < 2 else bad)[0] for step in range(1, 9)]
    assert sum(map(len, said)) == 2
    for cut in range(1, 8):
        first, second = watch_of(**{"length.steps": 3}), watch_of(**{"length.steps": 3})
        parts = [first.look(step, ROW if step < 2 else bad)[0] for step in range(1, cut + 1)]
        second.state = json.loads(json.dumps(first.state))
        parts += [second.look(step, bad)[0] for step in range(cut + 1, 9)]
        assert parts == said


# the update --------------------------------------------------------------------------------------


def trained(model, optimizer, count=3):
    spans = [ScoreRequest((3, 4, 5, 6), 1), ScoreRequest((7, 8, 9), 1)]
    for _ in range(count):
        term = update.LossTerm(Nll(Nll.Config()))
        update.accumulate(model, update.Batch(spans, {}, [term]), Pass(chunk_mib=16))
        yield


def frozen(model, optimizer):
    moments = optimizer.state_dict()["state"]
    return copy.deepcopy([[p.detach() for p in model.net.parameters()], moments])


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_a_skipped_step_leaves_weights_and_moments_bit_for_bit(bad):
    model = make_model()
    optimizer = update.make_optimizer(model, Optim(weight_decay=0.1))
    for _ in trained(model, optimizer):
        assert update.step(model, optimizer, 1e-2, 1.0)[1]
    before = frozen(model, optimizer)
    for _ in trained(model, optimizer, 1):
        if bad == "gradient":
            next(model.net.parameters()).grad[0, 0] = math.inf
        loss = math.nan if bad == "loss" else 1.0
        assert update.step(model, optimizer, 1e-2, 1.0, loss)[1] is False
    after = frozen(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    for slot, held in before[1].items():
        assert all(torch.equal(v, after[1][slot][k]) for k, v in held.items())
    assert all(p.grad is None for p in model.net.parameters())
    for _ in trained(model, optimizer, 1):
        update.step(model, optimizer, 1e-2, 1.0, 1.0)
    assert not torch.equal(after[0][0], next(model.net.parameters()))


class Nothing:
    def mask(self, columns):
        return torch.zeros(5)


def test_masked_tokens_are_counted():
    model = make_model()
    spans = [ScoreRequest((3, 4, 5, 6), 1), ScoreRequest((7, 8, 9), 1)]
    term = update.LossTerm(Nll(Nll.Config()), masks=[Nothing()])
    masked = update.accumulate(model, update.Batch(spans, {}, [term]), Pass(chunk_mib=16))
    assert masked.loss == 0.0 and masked.table["masked"].tolist() == [1.0] * 5
    term = update.LossTerm(Nll(Nll.Config()))
    batch = update.Batch(spans, {}, [term])
    assert "masked" not in update.accumulate(model, batch, Pass(chunk_mib=16)).table


# real stages -------------------------------------------------------------------------------------


def test_a_learning_rate_that_ruins_the_weights_stops_the_stage(base, tmp_path):
    run, done = stage(base, tmp_path, "sft", "stages.sft.optim.lr=1e38")
    assert done.returncode == 1 and "Traceback" not in done.stdout
    found = rows(run, "sft")
    assert [r.get("skipped") for r in found] == [None, 1, 1, 1]  # three in a row, never a step
    assert [len(r.get("warnings", [])) for r in found] == [0, 1, 1, 1]
    error = run.record("sft")["error"]
    assert "watchdogs.non_finite: loss nan" in error and "3 steps in a row" in error
    assert "stages.sft.watchdogs.non_finite.action=warn" in error
    assert done.stdout.count("sft: step 2: warning: watchdogs.non_finite") == 1
    seen = status(run)["stages"]["sft"]
    assert seen["status"] == "failed" and len(seen["warnings"]) == 3
    recipe, notes = reopen(run, ("stages.sft.watchdogs.non_finite.action=warn",))
    assert notes == ["stages.sft.watchdogs.non_finite.action: 'stop' -> 'warn'"]
    write_text(run / "resolved.yaml", dump(recipe.to_dict()))
    assert worker(run.path, "sft").returncode == 0
    assert [r["step"] for r in rows(run, "sft")] == [1, 2, 3, 4, 5, 6]


BAD_LOSS = """
import opdctl.train.update as update
real, seen = update.accumulate, []
def accumulate(*a, **k):
    result = real(*a, **k)
    seen.append(1)
    if len(seen) in (2, 5):
        result.loss = float("inf")
    return result
update.accumulate = accumulate
"""


def test_a_bad_batch_costs_one_step(base, tmp_path):
    run, done = stage(base, tmp_path, "sft", patch=BAD_LOSS)
    assert done.returncode == 0
    found = rows(run, "sft")
    assert [r.get("skipped") for r in found] == [None, 1, None, None, 1, None]
    assert [r["loss"] is None for r in found] == [False, True, False, False, True, False]
    table = status_table(status(run))
    assert any(
        "2 warnings, the last in step 5: watchdogs.non_finite" in str(c) for c in cells(table)
    )


def cells(table):
    return [cell for column in table.columns for cell in column.cells]


def far(base, *more):
    folder = base.path.parent / "far"
    return f"stages.opd.teachers.math={folder}", "stages.opd.watchdogs.kl.steps=2", *more


@pytest.mark.parametrize("objective", ["", "sampled_kl", "divergence"])
def test_a_teacher_far_away(base, tmp_path, objective):
    more = [f"stages.opd.objectives={{{objective}: {{}}}}", "stages.opd.signals={}"]
    more = more if objective else []
    keys = far(base, "stages.opd.watchdogs.kl.action=stop", *more)
    run, done = stage(base, tmp_path, "opd", *keys)
    assert done.returncode == 1
    assert "step 2: watchdogs.kl" in run.record("opd")["error"]
    assert "above 5" in run.record("opd")["error"]
    found = rows(run, "opd")
    assert [len(r.get("warnings", [])) > 0 for r in found] == [False, True]
    assert 0 <= found[0]["logprob_gap"] < 1e-5


KILL = """
import os, signal
import opdctl.rollout.engines.transformers as engine
real, seen = engine.Transformers.generate, []
def generate(*a, **k):
    seen.append(1)
    if len(seen) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
engine.Transformers.generate = generate
"""


def test_killed_and_resumed_it_says_the_same_and_gives_the_same_bits(base, tmp_path):
    signals = "stages.opd.signals={reverse_kl: {}, outcome: {baseline: none}}"
    keys = far(base, "stages.opd.watchdogs.reward.steps=2", signals)
    whole, done = stage(base, tmp_path / "whole", "opd", *keys)
    assert done.returncode == 0
    assert [len(r.get("warnings", [])) for r in rows(whole, "opd")] == [0, 2, 0, 2, 0]
    cut, killed = stage(base, tmp_path / "cut", "opd", *keys, patch=KILL)
    assert killed.returncode == -9 and len(rows(cut, "opd")) == 3
    assert worker(cut.path, "opd").returncode == 0
    assert [r["attempt"] for r in rows(cut, "opd")] == [1, 1, 2, 2, 2]
    assert_same(whole.path, cut.path, ["opd"])


LIE = """
import opdctl.rollout.sampling as sampling
real = sampling._sample_turn
def turn(engine, model, rollouts, *rest):
    real(engine, model, rollouts, *rest)
    for r in rollouts:
        r.behaviour_logprobs = [v - 1 for v in r.behaviour_logprobs]
sampling._sample_turn = turn
"""


def test_rewards_that_are_all_zero_and_a_broken_sampler(base, tmp_path):
    run, done = stage(
        base, tmp_path, "rl", "stages.rl.watchdogs.reward.steps=3",
        "stages.rl.watchdogs.mismatch.steps=4", "stages.rl.watchdogs.length.steps=2",
        "stages.rl.watchdogs.length.cut=0.5", patch=LIE,
    )  # fmt: skip
    assert done.returncode == 0
    said = status(run)["stages"]["rl"]["warnings"]
    assert "step 3: watchdogs.reward math: every reward is 0, 3 steps in a row" in said
    assert any(w.startswith("step 4: watchdogs.mismatch: 1 nats a token apart") for w in said)
    assert any(w.startswith("step 2: watchdogs.length limit:") for w in said)


def test_sampled_nll_is_what_the_samples_say(base, tmp_path):
    run, done = stage(base, tmp_path, "rl")
    assert done.returncode == 0
    for row in rows(run, "rl"):
        lines = (run.stage("rl") / "rollouts" / f"step-{row['step']:06d}.jsonl").read_text()
        logprobs = [v for line in lines.splitlines() for v in json.loads(line)["behaviour"]]
        assert row["sampled_nll"] == pytest.approx(-sum(logprobs) / len(logprobs), rel=1e-5)
        assert abs(row["sampled_nll"] - row["entropy"]) < 0.5 and row["logprob_gap"] < 1e-5


def test_a_source_that_refuses_everything(base, tmp_path):
    run, done = stage(base, tmp_path, "taught")
    assert done.returncode == 1
    assert [r["rollouts"] for r in rows(run, "taught")] == [0] * 4
    assert "step 3: warning: watchdogs.empty: 0 rollouts with 0 tokens" in done.stdout


# recipes and what a person sees ------------------------------------------------------------------


def test_watching_is_no_part_of_a_fingerprint(base):
    plain, other = (
        recipe_with(),
        recipe_with("stages.opd.watchdogs.kl={most: 1, action: stop, steps: 9}"),
    )
    assert plain.to_dict() != other.to_dict()
    assert fingerprints(plain) == fingerprints(other)
    assert "watch" not in semantic(plain, "opd")["stage"]
    assert not [name for name in revisions(plain, "opd") if name.startswith("watchdogs")]
    with pytest.raises(UsageError, match=r"optim\.lr"):
        reopen(base, ("stages.opd.watchdogs.kl.most=1", "stages.opd.optim.lr=0.5"))
    with pytest.raises(UsageError, match=r"stages\.opd\.watchdogs\.kl\.least"):
        recipe_with("stages.opd.watchdogs.kl.least=1")
    with pytest.raises(UsageError, match="no member 'kll'"):
        load("mimo", overrides=("stages.sft.watchdogs.kll.most=1",))


def test_a_warning_is_shown_once_when_it_comes(base, tmp_path, capsys):
    run = RunDir(base.path)
    recipe = recipe_with()
    metrics = run.stage("sft") / "metrics.jsonl"
    metrics.write_text('{"step": 1, "warnings": ["watchdogs.kl a: old"]}\n')
    job = Job.of(run, recipe)
    job.status["sft"] = "running"
    with Progress([job]) as progress:
        progress([job])
        with metrics.open("a") as file:
            file.write('{"step": 2, "warnings": ["watchdogs.kl a: new"]}\n{"step": 3, "warn')
        progress.drawn = 0.0
        progress([job])
        job.status["sft"] = "done"
        progress([job])
    shown = capsys.readouterr().err
    metrics.unlink()
    assert shown.count("sft: warning: step 2: watchdogs.kl a: new") == 1 and "old" not in shown
