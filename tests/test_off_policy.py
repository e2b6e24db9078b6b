"""Return-to-go, mixtures of sources and of models: by hand, by enumeration, by transformers."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from one_step import First, by_transformers, opd, said
from test_weights import step_of

from conftest import make_model
from opdctl.config.registry import member
from opdctl.loss.signals.return_to_go import ReturnToGo
from opdctl.loss.signals.reverse_kl import ReverseKl
from opdctl.models.model import load
from opdctl.models.packing import discounted_future_sum
from opdctl.rollout.engines import transformers as transformers_engine
from opdctl.rollout.engines.transformers import Transformers
from running import carry_out


def credit(step, **keys):
    return ReturnToGo(ReturnToGo.Config(**keys), None).credit(step)


def ratios(lengths, values):
    ones, zeros = [1.0] * len(values), [0.0] * len(values)
    return step_of(lengths, teacher=values, policy=zeros, teacher_weight=ones)


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_future_by_its_definition(discount):
    lengths = [3, 1, 4]
    values = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    by_hand, at = [], 0
    for n in lengths:
        v = values[at : at + n].tolist()
        by_hand += [sum(discount ** (j - t - 1) * v[j] for j in range(t + 1, n)) for t in range(n)]
        at += n
    assert discounted_future_sum(values, owner, 3, discount).tolist() == pytest.approx(
        by_hand, abs=1e-12
    )


def test_return_to_go_by_hand():
    step = ratios([3, 1], [1.0, 2.0, 4.0, 5.0])
    assert credit(step).tolist() == [7, 6, 4, 5]
    assert credit(step, discount=0.5).tolist() == [3, 4, 4, 5]
    assert credit(step, own=False).tolist() == [6, 4, 0, 0]
    assert credit(step, own=False, length_norm=True).tolist() == [3, 4, 0, 0]
    assert credit(step, length_norm=True).tolist() == pytest.approx([7 / 3, 3, 4, 5])
    assert credit(step, clip=2.0).tolist() == [5, 4, 2, 2]
    immediate = ReverseKl(ReverseKl.Config(), None).credit(step)
    assert torch.equal(credit(step, discount=0.0), immediate)


def test_single_step_plus_return_to_go_is_the_gradient_of_the_sequence_kl():
    """All sequences of three tokens over a vocabulary of three, in float64."""
    V, T = 3, 3
    generator = torch.Generator().manual_seed(1)
    shape = (V**T, V)  # a row of logits for each prefix, by its number
    z, w = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    z.requires_grad_()
    logp, logq = z.log_softmax(-1), w.log_softmax(-1)

    def rows(y):
        prefix = [0]
        for t in range(T - 1):
            prefix.append(prefix[-1] * V + y[t] + 1)
        return prefix

    exact, estimate = 0.0, 0.0
    for y in itertools.product(range(V), repeat=T):
        at = rows(y)
        lp, lq = logp[at, y], logq[at, y]
        mass = lp.sum().exp()
        exact = exact + mass * (lp - lq).sum()
        step = ratios([T], (lq - lp).tolist())
        single = (logp[at].exp() * (logp[at] - logq[at])).sum()
        later = -(credit(step, own=False) * lp).sum()
        estimate = estimate + mass.detach() * (single + later)
    (expected,) = torch.autograd.grad(exact, z, retain_graph=True)
    (gradient,) = torch.autograd.grad(estimate, z)
    assert expected.norm() > 0.1 and (gradient - expected).abs().max() < 1e-12


@pytest.mark.parametrize("padded", [0, 7])
def test_a_blend_samples_the_mixture_of_probabilities(model, padded):
    other, alpha, keys = make_model(5, extra_rows=padded), 0.3, list(range(40))
    prompts = [[5, 6, 7], [8, 9]] * 20
    sampling = {"temperature": 0.8, "max_tokens": 5}
    samples = Transformers(model, 64, blend=(other, alpha)).generate(prompts, keys, **sampling)
    rollouts = [
        SimpleNamespace(prompt_ids=p, response_ids=s.ids)
        for p, s in zip(prompts, samples, strict=True)
    ]
    p, q = (by_transformers(m, rollouts, 0.8, model.valid_V).detach() for m in (model, other))
    mixed = (alpha * q.exp() + (1 - alpha) * p.exp()).log()
    said_by = torch.tensor([v for s in samples for v in s.logprobs])
    assert torch.allclose(said_by, said(mixed, rollouts), atol=1e-4)
    assert not torch.allclose(said_by, said(p, rollouts), atol=1e-2)
    alone = Transformers(model, 64).generate(prompts, keys, **sampling)
    none = Transformers(model, 64, blend=(other, 0.0)).generate(prompts, keys, **sampling)
    assert [s.ids for s in none] == [s.ids for s in alone] != [s.ids for s in samples]


def test_the_other_model_of_a_blend_is_looked_at_too(model, monkeypatch):
    seen = []
    monkeypatch.setattr(transformers_engine, "reads_additive_mask", lambda m: False)
    monkeypatch.setattr(transformers_engine, "require_stepwise_sampling", seen.append)
    other = make_model(5)
    for _ in range(2):  # once each
        blended = Transformers(model, 8, blend=(other, 0.5))
        blended.generate([[5, 6]], [1], temperature=1.0, max_tokens=1)
    assert seen == [model, other]


def test_the_importance_weight_is_student_over_mixture(on_disk, tmp_path):
    gate = {"policy_gradient": {"weights": {"is_gate": {"low": 0.0, "high": 1e6}}}}
    keys = {"sources": {"teacher_mixed": {"alpha": 0.4}}, "objectives": gate}
    first = First(opd(on_disk, tmp_path, **keys))
    student, teacher = (load(str(on_disk / m)) for m in "st")
    p, q = (by_transformers(m, first.rollouts).detach() for m in (student, teacher))
    ratio = said(p, first.rollouts).exp() / (
        0.4 * said(q, first.rollouts).exp() + 0.6 * said(p, first.rollouts).exp()
    )
    assert torch.allclose(first.gradient()[2]["ratio"], ratio, atol=1e-4)
    assert float(ratio.max()) <= 1 / 0.6 + 1e-6  # bounded: nothing to clip


def mixture(ctx, model=None, **keys):
    cls = member("sources", "mixture")
    return cls(cls.Config(**keys), ctx, model or make_model())


def test_a_mixture_gives_each_prompt_to_one(on_disk, tmp_path):
    ctx = opd(on_disk, tmp_path, prompts={"per_step": 12})
    source = mixture(ctx, student=0.5, teacher=0.2, dataset=0.3)
    counts = {"student": 0, "teacher": 0, "dataset": 0}
    for step in range(200):
        assigned = source.assignment(step)
        assert sorted(i for places in assigned.values() for i in places) == list(range(12))
        for name, places in assigned.items():
            counts[name] += len(places) / 2400
    assert counts == pytest.approx({"student": 0.5, "teacher": 0.2, "dataset": 0.3}, abs=0.03)
    fading = mixture(ctx, student=0.0, teacher=1.0, dataset=0.0, decay=0.5)
    assert len(fading.assignment(0)["teacher"]) == 12
    late = [fading.assignment(s)["student"] for s in range(10, 20)]
    assert sum(map(len, late)) >= 118


def test_a_mixtures_rollouts_are_of_who_wrote_them(on_disk, tmp_path):
    ctx = opd(on_disk, tmp_path, prompts={"per_step": 12, "samples": 2})
    student = load(str(on_disk / "s"))
    student.tokenizer.chat_template = "{{ messages[0]['content'] }} "  # not the teacher's
    source = mixture(ctx, student, student=0.4, teacher=0.3, dataset=0.3)
    rollouts, places = source.draw(0), source.assignment(0)
    for name in places:
        mine = [r for r in rollouts if r.source == name]
        assert len(mine) == 2 * len(places[name]) > 0
        for r in mine:
            assert r.behaviour_logprobs is None
            assert r.prompt_ids == student.render(r.prompt.text)
            assert name != "dataset" or r.text == r.prompt.answer
    assert len({r.group for r in rollouts}) == 12
    whole = mixture(ctx, student, student=1.0, dataset=0.0)
    alone = member("sources", "student")(None, ctx, student)
    assert [r.response_ids for r in whole.draw(3)] == [r.response_ids for r in alone.draw(3)]


def test_the_ledger_counts_each_sampler(on_disk, tmp_path):
    import json

    keys = {"sources": {"mixture": {"student": 0.5, "teacher": 0.5, "dataset": 0.0}}}
    keys |= {"signals": {}, "objectives": {"divergence": {}}, "loss_temperature": 0.7}
    ctx = opd(on_disk, tmp_path, **keys)
    rows = carry_out(ctx)
    assert "logprob_gap" not in rows[0] and json.dumps(rows[0])
    first = First(opd(on_disk, tmp_path, **keys))
    assert first.setup.temperature == 0.7
    p, q = (by_transformers(load(str(on_disk / m)), first.rollouts, 0.7).detach() for m in "st")
    table = first.gradient()[2]
    assert torch.allclose(table["divergence"], (p.exp() * (p - q)).sum(-1), atol=1e-4)
    assert all(s.sampled > 0 for s in first.setup.source.sources)
