"""The log-ratio to a teacher as the papers' equations have it: of the policy as it is in each
update. In float64, over three updates of one step's rollouts, against the equations written out."""

import copy

import pytest
import torch
from one_step import First, by_transformers, said

from opdctl.models.model import load
from opdctl.recipe.methods import method
from opdctl.run.fingerprint import fingerprints
from opdctl.scoring.asks import Pass
from opdctl.stages.rl import ineffective_keys
from opdctl.train import update
from running import carry_out

UPDATES, RATE = 3, 2e-3


def seq_mean(value_N, lengths):
    return torch.stack([v.mean() for v in value_N.split(lengths)]).mean()


def inside(ratio_N, low, high):
    return torch.where((ratio_N >= low) & (ratio_N <= high), ratio_N, 0.0)


def glm5(live_N, old_N, sampler_N, teacher_N, lengths, gap_N):
    """GLM-5 Eq. 1 with the advantage of Eq. 2, both ends of the clip."""
    advantage_N = teacher_N - gap_N
    ratio_N = (live_N - old_N).exp()
    least_N = torch.minimum(ratio_N * advantage_N, ratio_N.clamp(0.8, 1.28) * advantage_N)
    return -seq_mean(inside((old_N - sampler_N).exp(), 0.5, 2.0) * least_N, lengths)


def mopd(live_N, old_N, sampler_N, teacher_N, lengths, gap_N):
    """MiMo Eq. 7 and 8, the advantage cut at 5."""
    advantage_N = (teacher_N - gap_N).clamp(-5, 5)
    weight_N = inside((live_N.detach() - sampler_N).exp(), 0.5, 2.0)
    return -seq_mean(weight_N * advantage_N * live_N, lengths)


def first_of(stage, name, policy):
    keys = {k: v for k, v in method(name).items() if k not in ("about", "kind")}
    keys["signals"] = {"reverse_kl": keys["signals"]["reverse_kl"] | {"policy": policy}}
    keys |= {"epochs": UPDATES, "prompts": {"per_step": 6}, "student": "s64", "teacher": "t64"}
    return First(stage(runtime={"dtype": "float64"}, **keys))


def moved(model, batch, run):
    """The parameters after each update, as the loop takes them."""
    optimizer, steps = update.make_optimizer(model, update.Optim(lr=RATE)), []
    for _ in range(UPDATES):
        result = update.accumulate(model, batch, run)
        assert update.step(model, optimizer, RATE, 1.0, result.loss)[1]
        steps.append(torch.cat([p.detach().flatten().clone() for p in model.net.parameters()]))
    return steps


def by_the_equation(model, first, teacher_N, formula, policy):
    optimizer, steps = update.make_optimizer(model, update.Optim(lr=RATE)), []
    lengths = [r.length for r in first.rollouts]
    old_N = said(by_transformers(model, first.rollouts), first.rollouts)
    for _ in range(UPDATES):
        live_N = said(by_transformers(model, first.rollouts), first.rollouts, detach=False)
        gap_N = live_N.detach() if policy == "live" else old_N
        sampler_N = first.columns["behaviour"]
        formula(live_N, old_N, sampler_N, teacher_N, lengths, gap_N).backward()
        torch.nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(torch.cat([p.detach().flatten().clone() for p in model.net.parameters()]))
    return steps


@pytest.mark.parametrize("formula", [glm5, mopd])
def test_updates_are_those_of_the_papers_equation(stage, on_disk, float64, formula):
    teacher, ends = load(str(on_disk / "t64"), dtype="float64"), {}
    for policy in ("live", "old"):
        first = first_of(stage, formula.__name__, policy)
        teacher_N = said(by_transformers(teacher, first.rollouts), first.rollouts)
        twin = copy.deepcopy(first.model)
        batch = first.setup.batch(first.spans, first.columns, first.step.teacher_cache)
        ours = moved(first.model, batch, Pass())
        theirs = by_the_equation(twin, first, teacher_N, formula, policy)
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() < 1e-9
        ends[policy] = ours
    apart = [float((a - b).abs().max()) for a, b in zip(*ends.values(), strict=True)]
    assert apart[0] < 1e-10 and min(apart[1:]) > 1e-6  # equal at one update, other beyond


def test_a_fixed_signal_beside_it_keeps_its_credit(stage, float64):
    """MiMo Eq. 9: sg[log T - log live] + alpha x outcome, of the rollouts' own making."""
    signals = {"reverse_kl": {"policy": "live", "coef": 0.5}, "kl_baseline": {"coef": 2.0}}
    keys = {"student": "s64", "teacher": "t64", "epochs": 2, "signals": signals}
    first = First(stage(runtime={"dtype": "float64"}, **keys))
    columns = first.columns
    fixed_N = 2.0 * columns["policy_kl"]
    assert torch.allclose(columns["advantage_fixed"], fixed_N, atol=1e-12)
    old_N = 0.5 * (columns["teacher"] - columns["policy"]) + fixed_N
    assert torch.allclose(columns["advantage"], old_N, atol=1e-12)
    seen = []
    objective = first.setup.terms[0].objective
    loss = objective.loss
    objective.loss = lambda view: seen.append((view["advantage"], view.logprob_C)) or loss(view)
    with torch.no_grad():
        for p in first.model.net.parameters():
            p += 0.01
    first.gradient()
    live_N = said(by_transformers(first.model, first.rollouts), first.rollouts)
    expected_N = 0.5 * (columns["teacher"] - live_N) + fixed_N
    advantage_N = torch.cat([a for a, _ in seen])
    assert not any(a.requires_grad for a, _ in seen)
    assert torch.allclose(advantage_N.sort().values, expected_N.sort().values, atol=1e-10)


def test_the_key_is_neutral_and_said_to_do_nothing_at_one_update(stage):
    plain = stage(signals={"reverse_kl": {}})
    old = stage(signals={"reverse_kl": {"policy": "old"}})
    live = stage(signals={"reverse_kl": {"policy": "live"}})
    prints = [fingerprints(ctx.recipe)["it"] for ctx in (plain, old, live)]
    assert prints[0] == prints[1] != prints[2]
    notes = [n for n in ineffective_keys(live.config) if n.path == "signals.reverse_kl.policy"]
    assert len(notes) == 1 and "one update" in notes[0].message
    rows = carry_out(stage(epochs=2, signals={"reverse_kl": {"policy": "live"}}))
    assert all(r["reverse_kl_mean"] is not None for r in rows)
