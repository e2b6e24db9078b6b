"""Weights of the literature on hand-made steps: float64, golden numbers, what enters the count."""

import math
from types import SimpleNamespace

import pytest
import torch

from opdctl.config.registry import member
from opdctl.kernels.topk import divergence_on
from opdctl.loss.signals.reverse_kl import ReverseKl
from opdctl.loss.token_view import PerStep
from opdctl.train import update
from opdctl.train.score_step import set_weights
from opdctl.train.step import Step
from opdctl.types import Prompt, Rollout

S = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
T = torch.tensor([[0.2, 0.6, 0.05, 0.15]], dtype=torch.float64).log()


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def step_of(lengths, right=None, groups=None, ids=None, done=0, steps=10, **columns):
    """Rollouts of these lengths, verdicts and groups, with per-token columns."""
    rollouts = []
    for i, n in enumerate(lengths):
        given = ids[i] if ids else [5] * n
        group = groups[i] if groups else i
        rollouts.append(Rollout(Prompt(str(i), "d", "q", "a", {}), [1], given, group=group))
        rollouts[-1].version = done
        rollouts[-1].right = right[i] if right else None
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokenizer = SimpleNamespace(get_vocab=lambda: {"<think>": 7}, all_special_ids=[0, 2])
    model = SimpleNamespace(
        logits_dtype=torch.float64, tokenizer=tokenizer, lm_head=lambda: SimpleNamespace(valid_V=4)
    )
    found = {k: tensor(v) for k, v in columns.items()}
    step = Step(rollouts, found, owner, model=model, steps=steps)
    if right:
        step.columns["right"] = step.spread(right)
    return step


def weight(name, **keys):
    cls = member("weights", name)
    return cls(cls.Config(**keys))


def entropy(log_p):
    return float(-(log_p.exp() * log_p).sum())


def test_eopd_acts_above_tau():
    step = step_of([3], teacher_entropy=[0.79, 0.81, 2.0])
    assert weight("eopd").factor(step).tolist() == [0, 1, 1]


def test_eopds_divergence_is_the_forward_kl_to_the_truncated_teacher():
    ids = torch.tensor([[1, 0]])
    p, q = S.gather(-1, ids).requires_grad_(), T.gather(-1, ids)
    keep = torch.ones(1, 2, dtype=torch.bool)
    tails = tensor([0.2]).log(), tensor([0.2]).log()
    found = divergence_on(p, q, keep, "truncated", "forward", 0.5, tails)
    by_hand = 0.75 * math.log(0.75 / 0.3) + 0.25 * math.log(0.25 / 0.5)
    assert float(found.detach()) == pytest.approx(by_hand, abs=1e-12)
    logits = S.clone().requires_grad_()
    log_p = logits.log_softmax(-1)
    outside = (1 - log_p.gather(-1, ids).exp().sum(-1)).log()
    loss = divergence_on(
        log_p.gather(-1, ids), q, keep, "truncated", "forward", 0.5, (outside,) * 2
    )
    loss.sum().backward()
    expected = S.exp() - tensor([[0.25, 0.75, 0, 0]])  # p minus the renormalised teacher
    assert torch.allclose(logits.grad, expected, atol=1e-12)


def test_confidence_has_the_golden_number():
    step = step_of([3], teacher_entropy=[entropy(T), 0.0, math.log(4)])
    assert weight("confidence").factor(step).tolist() == pytest.approx([0.23340, 1, 0], abs=1e-5)


def test_tip_is_a_soft_or_of_both_scales():
    h, d = [0.0, 0.5, 1.0, 1.0, 0.0], [2.0, 2.0, 1.0, 3.0, 3.0]
    step = step_of([2, 3], policy_entropy=h, policy_kl=d)
    assert weight("tip").score(step).tolist() == pytest.approx([0.5, 0.75, 1, 1, 1])
    assert weight("tip", keep=0.6).mask(step).tolist() == [0, 0, 1, 1, 1]
    assert weight("tip", keep=0.4).mask(step).tolist() == [0, 0, 1, 1, 0]  # of equals the first
    flat = step_of([2], policy_entropy=[1.0, 1.0], policy_kl=[0.0, 0.0])
    assert weight("tip").score(flat).tolist() == [0, 0]


def test_tip_cuts_the_largest_entropies():
    """One outlier would press all others to zero."""
    h = [*torch.linspace(0, 1, 99).tolist(), 1e6]
    step = step_of([100], policy_entropy=h, policy_kl=[0.0] * 100)
    assert weight("tip").score(step)[49] > 0.4
    assert weight("tip", cut=0.0).score(step)[49] < 1e-5


def test_reopold_drops_below_the_floor_then_keeps_the_uncertain():
    floor = math.log(0.1) / 0.9
    assert floor == pytest.approx(-2.558428, abs=1e-6)
    columns = {
        "teacher": [-3.0, -3.0, -1.0, -9.0, -1.0],
        "policy": [-0.5, -0.4, -1.0, -1.0, -2.0],
        "policy_entropy": [0.1, 0.9, 0.2, 0.3, 0.4],
    }
    step = step_of([2, 3], done=4, **columns)
    assert weight("reopold").mask(step).tolist() == [1, 0, 1, 0, 1]
    later = step_of([2, 3], done=5, **columns)
    assert weight("reopold").mask(later).tolist() == [0, 1, 0, 0, 0]
    step.columns["teacher_weight"] = tensor([1.0] * 5)
    credit = ReverseKl(ReverseKl.Config(floor=0.1), None).credit(step).tolist()
    assert credit == pytest.approx([-2.5, floor, 0, floor, 1])


NLL = {"policy": [1.0, 1.0, 2.0, 3.0, 1.0], "teacher": [4.0, 2.0, 1.0, 2.0, 1.0]}


def scope_step():
    columns = {k: [-x for x in v] for k, v in NLL.items()}
    return step_of([2, 1, 1, 1], [1.0, 1.0, 0.0, 0.0], [0, 0, 0, 1], **columns)


def test_scope_goes_the_way_of_its_formula():
    """The student's surprising successes up, the teacher's confident corrections up."""
    step = scope_step()
    right, wrong = weight("scope", path="right"), weight("scope", path="wrong")
    assert right.mask(step).tolist() == [1, 1, 1, 0, 0]
    assert wrong.mask(step).tolist() == [0, 0, 0, 1, 1]
    e = math.e
    found = right.factor(step).tolist()  # mean nll 1 and 2: perplexities e and e^2
    assert found[:3] == pytest.approx([2 * e / (e + e**2)] * 2 + [2 * e**2 / (e + e**2)])
    released = weight("scope", path="right", sign="released").factor(step).tolist()
    assert released[:3] == pytest.approx([2 * e**2 / (e + e**2)] * 2 + [2 * e / (e + e**2)])
    assert wrong.factor(step).tolist()[3:] == [1, 1]  # alone on the path of their groups
    both = step_of([1, 1], [0.0, 0.0], [0, 0], policy=[-1.0, -1.0], teacher=[-1.0, -3.0])
    assert wrong.factor(both).tolist() == pytest.approx([2 / (1 + e**-2), 2 * e**-2 / (1 + e**-2)])
    soft = weight("scope", path="wrong", tau=2.0).factor(both).tolist()
    assert soft == pytest.approx([2 / (1 + e**-1), 2 * e**-1 / (1 + e**-1)])


def test_special_tokens_are_masked_once():
    step = step_of([5, 3], ids=[[7, 5, 7, 2, 2], [5, 7, 2]])
    found = weight("special_tokens").mask(step).tolist()
    assert found == [0, 1, 1, 0, 1, 1, 0, 0]
    assert weight("special_tokens", texts=[]).mask(step).tolist()[0] == 1


def test_position_is_of_the_responses_own_length():
    step = step_of([2, 5])
    late = weight("position", shape="late").factor(step)
    by_hand = [0.25 + 0.75 / (1 + math.exp(-(t - 0.3) / 0.1)) for t in (0.5, 1.0)]
    assert late[:2].tolist() == pytest.approx(by_hand)
    shares = [0.2, 0.4, 0.6, 0.8, 1.0]
    assert late[2:].tolist() == pytest.approx(
        [0.25 + 0.75 / (1 + math.exp(-(t - 0.3) / 0.1)) for t in shares]
    )
    early = weight("position", shape="early").factor(step)
    assert torch.allclose(early + late, torch.full((7,), 1.25).double())


def test_outcome_gate_keeps_one_side():
    step = step_of([2, 1], [1.0, 0.0])
    assert weight("outcome_gate").mask(step).tolist() == [0, 0, 1]
    assert weight("outcome_gate", on="right").mask(step).tolist() == [1, 1, 0]


def test_masks_enter_the_count_and_factors_do_not():
    step = step_of([2, 1, 1, 1], [1.0, 0.0, 0.0, 0.0], [0, 0, 0, 1])
    gate, scope = weight("outcome_gate"), weight("eopd")
    step.columns["teacher_entropy"] = tensor([0, 0, 0, 2.0, 2.0])
    term = update.LossTerm(
        None,
        normalise="token_mean",
        masks=[PerStep("mask", gate.mask)],
        factors=[PerStep("factor", scope.factor)],
    )
    logged = set_weights(step, [term])
    assert logged == {"mask": pytest.approx(0.6), "factor": pytest.approx(0.4)}
    found = update.normalisers(term, step.sequence_N, 4, step.columns).tolist()
    assert found == pytest.approx([0, 0, 0, 1 / 3, 1 / 3])


def test_a_side_without_rollouts_is_no_division_by_zero():
    step = step_of([2, 1], [1.0, 1.0])
    term = update.LossTerm(None, masks=[PerStep("mask", weight("outcome_gate").mask)])
    set_weights(step, [term])
    for normalise in ("token_mean", "seq_mean"):
        term.normalise = normalise
        assert update.normalisers(term, step.sequence_N, 2, step.columns).tolist() == [0, 0, 0]
