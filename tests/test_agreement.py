"""How student and teacher agree, by hand and in runs: logged everywhere, and of no consequence."""

import math

import pytest
import torch
from one_step import First, by_transformers
from test_served import serving

from opdctl.kernels.topk import overlap_numbers, overlap_ratio
from opdctl.run.rundir import RunDir
from running import carry_out, plain

NAMES = {"overlap", "overlap_mass", "overlap_teacher_mass", "overlap_advantage", "entropy_gap"}


def test_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).double()
    q = torch.tensor([[0.2, 0.1, 0.6, 0.1]]).double()
    ours, theirs = torch.tensor([[0, 1]]), torch.tensor([[2, 0]])  # both have id 0 alone
    logs = [x.log().gather(-1, theirs) for x in (p, q)]
    found = {k: float(v) for k, v in overlap_numbers(*logs, ours, theirs).items()}
    assert found == pytest.approx(
        {
            "overlap": 0.5,
            "overlap_mass": 0.5,
            "overlap_teacher_mass": 0.2,
            "overlap_advantage": 0.0,  # one id: renormalised it is 1 on both sides
        }
    )
    ours = torch.tensor([[2, 0]])  # both ids: p (.769, .231), q (.25, .75) renormalised
    found = {k: float(v) for k, v in overlap_numbers(*logs, ours, theirs).items()}
    a, b = (0.5 / 0.65, 0.15 / 0.65), (0.25, 0.75)
    kl = sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
    assert found == pytest.approx(
        {
            "overlap": 1.0,
            "overlap_mass": 0.65,
            "overlap_teacher_mass": 0.8,
            "overlap_advantage": -kl / 2,
        }
    )
    apart = overlap_numbers(*logs, torch.tensor([[1, 3]]), theirs)
    assert all(float(value) == 0 for value in apart.values())


def bits(ctx):
    return RunDir(ctx.run.path).output("it") / "model.safetensors"


SAMPLED = {}
HIDDEN = {"signals": {}, "objectives": {"hidden": {}}}


@pytest.mark.parametrize("keys", [SAMPLED, HIDDEN])
def test_it_is_measured_and_changes_nothing(stage, keys):
    rows, files = [], []
    for every in (0, 2):
        ctx = stage(steps=5, runtime={"log_overlap_every": every}, **keys)
        rows.append(carry_out(ctx))
        files.append(bits(ctx).read_bytes())
    assert files[0] == files[1]
    assert not any(NAMES & row.keys() for row in rows[0])
    assert [row["step"] for row in rows[1] if row.keys() >= NAMES] == [1, 2, 4, 5]
    drop = {*NAMES, "overlap_k", "entropy", "teacher_entropy"}
    kept = [[{k: v for k, v in plain(r).items() if k not in drop} for r in each] for each in rows]
    assert kept[0] == kept[1]
    first = rows[1][0]
    assert 0 < first["overlap"] < 1 and first["overlap_advantage"] < 0 < first["entropy_gap"]


@pytest.mark.parametrize(
    ("objective", "steps"),
    [
        ({"divergence": {}}, [1, 2, 3]),
        ({"divergence": {"support": "topk_teacher", "k": 9}}, [1, 2, 3]),
        ({"topk_pg": {"k": 9}}, [1, 2, 3]),
        ({"topk_pg": {"k": 2}}, [1, 3]),  # too few ids at hand: it is measured apart
    ],
)
def test_it_is_what_the_exact_objective_logs(stage, objective, steps):
    """All tokens of the first step, measured apart and in the pass that has the logits; of the
    same k, whatever the loss takes."""
    runtime = {"log_rollouts": 99}
    apart = carry_out(stage(steps=1, runtime=runtime))
    within = carry_out(stage(steps=3, runtime=runtime, signals={}, objectives=objective))
    assert apart[0]["overlap_k"] == within[0]["overlap_k"] == 5
    assert [row["step"] for row in within if row.keys() >= NAMES] == steps
    assert all(("overlap_k" in row) == ("overlap" in row) for row in within)
    for name in NAMES:
        assert apart[0][name] == pytest.approx(within[0][name], rel=1e-4), name


def test_a_student_taught_by_itself_agrees(stage):
    own = carry_out(stage(steps=2, teacher="policy", **SAMPLED))
    assert own[0]["overlap"] == 1 and own[0]["entropy_gap"] == own[0]["overlap_advantage"] == 0
    assert own[1]["overlap_advantage"] <= 0


@pytest.mark.parametrize(
    ("column", "weights"),
    [
        ("mask.divergence.tip", {"tip": {"keep": 0.3}}),
        ("factor.divergence.eopd", {"eopd": {"tau": 3.695}}),
    ],
)
def test_tokens_that_no_objective_learns_from_are_not_measured(stage, column, weights):
    """Neither what a mask nor what a factor takes is in the means, against transformers' own."""
    keys = {"direction": "forward", "weights": weights}
    keys = {"steps": 1, "signals": {}, "objectives": {"divergence": keys}}
    first, row = First(stage(**keys)), carry_out(stage(**keys))[0]
    teacher = next(iter(first.setup.teachers.values()))[0].model
    logp_NV, logq_NV = (
        by_transformers(m, first.rollouts, valid_V=m.valid_V).detach()
        for m in (first.model, teacher)
    )
    kept_N = first.columns[column] != 0
    assert 0 < int(kept_N.sum()) < len(kept_N)
    assert row["masked"] == pytest.approx(float((~kept_N).float().mean()))
    kl_N = (logq_NV.exp() * (logq_NV - logp_NV)).sum(-1)
    exact = {"divergence": kl_N, "entropy": -(logp_NV.exp() * logp_NV).sum(-1)}
    for name, value_N in exact.items():
        assert row[name] == pytest.approx(float(value_N[kept_N].mean()), rel=1e-4), name
    lengths = [r.length for r in first.rollouts]
    each = [v[k] for v, k in zip(kl_N.split(lengths), kept_N.split(lengths), strict=True)]
    each = [float(v.mean()) for v in each if len(v)]
    assert row["divergence_by_domain"]["sums"] == pytest.approx(sum(each) / len(each), rel=1e-4)


@pytest.mark.parametrize("objective", ["hidden", "divergence"])
def test_it_is_of_the_students_own_texts(stage, objective):
    """Measured apart or in the update, where others wrote some of a step's texts, or all."""
    keys = {"steps": 1, "prompts": {"per_step": 12}, "runtime": {"log_rollouts": 99}}
    keys |= {"signals": {}, "objectives": {objective: {}}}
    mixed, others = (
        keys | {"sources": {"mixture": {"student": s, "teacher": 1 - s, "dataset": 0.0}}}
        for s in (0.5, 0.0)
    )
    row = carry_out(stage(**others))[0]
    assert row["rollouts"] > 0 and not {*NAMES, "overlap_k"} & row.keys()
    first, row = First(stage(**mixed)), carry_out(stage(**mixed))[0]
    teacher = next(iter(first.setup.teachers.values()))[0].model
    sides = [
        by_transformers(m, first.rollouts, valid_V=m.valid_V).topk(5, -1).indices
        for m in (first.model, teacher)
    ]
    own_N = torch.tensor([r.source == "student" for r in first.rollouts for _ in range(r.length)])
    exact_N = overlap_ratio(*sides)
    assert 0 < int(own_N.sum()) < len(own_N) and exact_N[own_N].mean() != exact_N.mean()
    assert row["overlap"] == pytest.approx(float(exact_N[own_N].mean()))


def test_what_the_sampler_says_is_compared_on_the_tokens_that_learn(stage):
    """Two updates log every token twice, and the sampler's log-probs are there once."""
    masked = {"policy_gradient": {"weights": {"special_tokens": {}}}}
    row = carry_out(stage(steps=1, updates_per_rollout=2, objectives=masked))[0]
    assert 0 < row["masked"] < 1 and 0 < row["logprob_gap"] < 1e-5


def test_a_server_that_gives_log_probs_alone_is_left_out(stage):
    with serving() as server:
        rows = carry_out(stage(steps=1, teachers={"teacher": server.url}))
    assert rows[0]["rollouts"] == 6 and not NAMES & rows[0].keys()
