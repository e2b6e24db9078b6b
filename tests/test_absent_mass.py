"""Ids that a side gives no probability, a logit of -inf: 0 log 0 is 0, at every level and form."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from one_step import opd
from test_chunks import CPU, LEVELS, columns_of, head_of, plain_logits, tensor

from opdctl.errors import StageFailed
from opdctl.evidence.verdict import Condition, verdict
from opdctl.kernels import triton_rows
from opdctl.kernels.reference import divergence as by_formula
from opdctl.kernels.reference import kl
from opdctl.kernels.topk import divergence_on
from opdctl.loss.objectives.divergence import Divergence
from opdctl.loss.objectives.topk_pg import TopkPg
from opdctl.loss.objectives.topk_tail import TopkTail
from opdctl.loss.token_view import LossTerm, weighted_sum
from opdctl.models.model import Model
from opdctl.scoring.quantities import QUANTITIES, list_entropy
from opdctl.scoring.teacher_cache import CachedTeacher, TeacherCache, reverse_kl
from running import carry_out

N, V, D = 6, 23, 5
GONE = [0, 3, 4, 5, 11, 22]  # of the teacher
WAYS = [("forward", 0.5), ("jsd", 0.3), ("jsd", 0.5), ("jsd", 0.0)]
ALL = LEVELS | {"triton": triton_rows.Rows}


def sides(gone=GONE, ours=(), dtype=torch.float64):
    """Hidden rows and a head of a student, trained, and a teacher without mass at some ids."""
    hidden = tensor(N, D, seed=1, dtype=dtype).requires_grad_()
    head, other = (head_of(V, D, s, dtype=dtype, trained=s == 2, bias=True) for s in (2, 4))
    with torch.no_grad():
        other.bias_V[gone] = -torch.inf
        head.bias_V[list(ours)] = -torch.inf
    rows = tensor(N, D, seed=3, dtype=dtype)
    logits = plain_logits(rows, other)
    q = logits.softmax(-1)
    entropy = -torch.xlogy(q, q).sum(-1)
    top = logits.topk(V, dim=-1).indices
    held = CachedTeacher(other, rows, logits.logsumexp(-1), top, entropy, name="pruned")
    return hidden, head, TeacherCache([held], CPU)


def columns(dtype=torch.float64):
    return columns_of(torch.zeros(N, dtype=torch.long), torch.ones(N, dtype=dtype))


def run(objective, hidden, head, taught, level="chunked", size=4):
    return weighted_sum(
        hidden,
        head,
        torch.arange(N) + 6,
        columns(hidden.dtype),
        [(LossTerm(objective), torch.ones(N, dtype=hidden.dtype))],
        rows_of=ALL[level],
        size=size,
        teacher_cache=taught,
    )


def exact(p, q, direction, beta):
    """The divergence by its formula, 0 log 0 = 0, in plain autograd. Shape [N]."""
    if direction == "forward" or beta == 0:
        return torch.xlogy(q, q).sum(-1) - (q * p.log()).where(q > 0, 0.0).sum(-1)
    m = beta * q + (1 - beta) * p
    ours = (p * (p / m).log()).sum(-1)
    theirs = torch.xlogy(q, q).sum(-1) - (q * m.log()).where(q > 0, 0.0).sum(-1)
    return beta * theirs + (1 - beta) * ours


@pytest.mark.parametrize("level", ALL)
@pytest.mark.parametrize(("direction", "beta"), WAYS)
def test_an_id_without_mass_adds_nothing(monkeypatch, level, direction, beta):
    """Value and gradient are those of the formula in float64 (Triton's level has float32 alone);
    a block and the first of its row may be without any mass."""
    monkeypatch.setattr(triton_rows, "BLOCK", 4)
    dtype, near = (torch.float32, 2e-6) if level == "triton" else (torch.float64, 1e-12)
    hidden, head, taught = sides(list(range(8)), dtype=dtype)
    keys = {"direction": direction, "beta": beta}
    total, table = run(Divergence(Divergence.Config(**keys)), hidden, head, taught, level)
    total.backward()
    ours = [hidden.grad, head.weight_VD.grad, head.bias_V.grad]
    wide, plain_head, _ = sides(list(range(8)))
    leaves = [wide, plain_head.weight_VD, plain_head.bias_V]
    p = plain_logits(wide, plain_head).softmax(-1)
    held = sides(list(range(8)))[2].held[0]
    q = plain_logits(held.hidden_ND, held.head).detach().softmax(-1)
    value_N = exact(p, q, direction, beta)
    for got, expected in zip(ours, torch.autograd.grad(value_N.sum(), leaves), strict=True):
        assert got.isfinite().all() and (got - expected).abs().max() < near * 10
    assert (table["divergence"] - value_N.detach()).abs().max() < near * 10
    entropy_N = -torch.xlogy(q, q).sum(-1)
    assert (table["teacher_entropy"] - entropy_N).abs().max() < near * 10
    assert table["teacher_logprob"].isinf().tolist() == [True] * 2 + [False] * 4  # of ids 6, 7
    assert not any(value_N.isnan().any() for value_N in table.values())


@pytest.mark.parametrize("level", ALL)
def test_both_sides_may_lack_the_same_ids(level):
    """A student and a teacher of one pruned vocabulary: as if the ids were not there."""
    dtype, near = (torch.float32, 1e-5) if level == "triton" else (torch.float64, 1e-12)
    for direction, beta in (*WAYS, ("reverse", 0.5)):
        hidden, head, taught = sides(ours=GONE, dtype=dtype)
        keys = {"direction": direction, "beta": beta}
        total, table = run(Divergence(Divergence.Config(**keys)), hidden, head, taught, level)
        total.backward()
        left = [v for v in range(V) if v not in GONE]
        held = taught.held[0]
        log_p, log_q = (
            plain_logits(*side).detach()[:, left].double().log_softmax(-1)
            for side in ((hidden, head), (held.hidden_ND, held.head))
        )
        value_N = by_formula(log_p, log_q, direction, beta)
        assert (table["divergence"] - value_N).abs().max() < near
        assert (table["entropy"] + (log_p.exp() * log_p).sum(-1)).abs().max() < near
        assert hidden.grad.isfinite().all() and head.bias_V.grad[GONE].abs().max() == 0


@pytest.mark.parametrize("level", ALL)
@pytest.mark.parametrize("support", ["full", "topk_student", "topk_union"])
def test_an_infinite_divergence_is_refused_by_name(level, support):
    dtype = torch.float32 if level == "triton" else torch.float64
    objective = Divergence(Divergence.Config(support=support, k=V))
    with pytest.raises(StageFailed, match="teacher pruned is infinite") as caught:
        run(objective, *sides(dtype=dtype), level)
    assert "forward or jsd" in caught.value.hint


def test_the_other_side_without_mass_is_refused_too():
    """The student has none where the teacher has some: the forward KL is infinite."""
    for level in LEVELS:
        with pytest.raises(StageFailed, match="infinite"):
            run(Divergence(Divergence.Config(direction="forward")), *sides([], [7]), level)
        with pytest.raises(StageFailed, match="infinite"):
            reverse_kl(
                sides()[0].detach(),
                sides()[1],
                sides()[2],
                {k: v[:, None] for k, v in columns().items()},
                rows_of=ALL[level],
                size=4,
            )
    assert kl(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([[0.0, 0.0]])).isfinite().all()


FORMS = ("tail", "generalised", "renormalised", "truncated")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("form", "support"),
    [*itertools.product(FORMS, ("topk_student", "topk_teacher", "topk_union"))],
)
def test_top_k_forms_are_finite_and_right(level, form, support):
    """At k = V tail and generalised are the whole divergence; all forms have finite gradients."""
    directions = ["forward"] if form == "truncated" else ["forward", "jsd"]
    for direction, k in itertools.product(directions, (2, 9, V)):
        hidden, head, taught = sides()
        keys = {"direction": direction, "form": form, "support": support, "k": k}
        total, table = run(Divergence(Divergence.Config(**keys)), hidden, head, taught, level)
        total.backward()
        assert hidden.grad.isfinite().all() and head.weight_VD.grad.isfinite().all()
        assert table["divergence"].isfinite().all() and table["divergence"].min() >= 0
        if k == V:
            p = plain_logits(hidden, head).detach().softmax(-1)
            held = taught.held[0]
            q = plain_logits(held.hidden_ND, held.head).detach().softmax(-1)
            value_N = exact(p, q, direction, 0.5)
            assert (table["divergence"] - value_N).abs().max() < 1e-12


def test_a_teacher_without_mass_on_any_candidate_teaches_nothing_forward():
    log_p = tensor(2, 4, seed=1).log_softmax(-1)
    log_q, keep = torch.full_like(log_p, -torch.inf), torch.ones_like(log_p, dtype=torch.bool)
    live = log_p.clone().requires_grad_()
    divergence_on(live, log_q, keep, "renormalised", "forward", 0.5).sum().backward()
    assert live.grad.abs().max() < 1e-15
    assert divergence_on(log_p, log_q, keep, "renormalised", "reverse", 0.5).isinf().all()


def test_policy_gradients_over_candidates():
    """Weighted by the teacher a candidate without mass adds nothing; by the student it is
    refused."""
    by_teacher = TopkPg(TopkPg.Config(k=V, weighting="teacher", support="topk_teacher"))
    hidden, head, taught = sides()
    total, _ = run(by_teacher, hidden, head, taught)
    total.backward()
    held = taught.held[0]
    live = hidden.detach().clone().requires_grad_()
    log_p = plain_logits(live, head).log_softmax(-1)
    q = plain_logits(held.hidden_ND, held.head).detach().softmax(-1)
    kept = q > 0
    gain = torch.where(kept, q * (q.log() - log_p.detach()), 0.0)
    (expected,) = torch.autograd.grad(-(gain * log_p).sum(), live)
    assert (hidden.grad - expected).abs().max() < 1e-12
    for objective in (TopkPg(TopkPg.Config(k=V)), TopkTail(TopkTail.Config(k=V))):
        with pytest.raises(StageFailed, match="teacher pruned"):
            run(objective, *sides())


def test_numbers_of_a_teacher_without_mass_somewhere():
    logits = tensor(3, V, seed=2)
    logits[:, GONE] = -torch.inf
    q = logits.softmax(-1)
    entropy_N = QUANTITIES["entropy"].of(logits.clone(), torch.tensor([1, 2, 7]))
    assert torch.allclose(entropy_N, -torch.xlogy(q, q).sum(-1), atol=1e-12)
    listed = torch.tensor([[0.0, -torch.inf], [math.log(0.5), -torch.inf]], dtype=torch.float64)
    assert list_entropy(listed).tolist() == pytest.approx([0.0, math.log(2)], abs=1e-12)


def pruned(monkeypatch, gone):
    """Give the teacher of a stage no mass at some ids."""
    whole = Model.lm_head

    def lm_head(self, *args):
        head = whole(self, *args)
        if not args or not self.name.endswith("/t"):  # without any, it is looked at as it loads
            return head
        bias_V = torch.zeros(len(head.weight_VD))
        bias_V[gone] = -torch.inf
        return replace(head, bias_V=bias_V)

    monkeypatch.setattr(Model, "lm_head", lm_head)


STAGES = {
    "forward": {"signals": {}, "objectives": {"divergence": {"direction": "forward"}}},
    "jsd": {"signals": {}, "objectives": {"divergence": {"direction": "jsd"}}},
    "reverse": {"signals": {}, "objectives": {"divergence": {}}},
    "credit": {"signals": {"reverse_kl": {}}},
    "baseline": {"signals": {"reverse_kl": {}, "kl_baseline": {}}},
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_with_a_teacher_of_a_part_of_the_vocabulary(on_disk, tmp_path, monkeypatch, name):
    """It learns, away from what the teacher never says; or it stops and names the teacher."""
    gone = list(range(3, 30))
    pruned(monkeypatch, gone)
    ctx = opd(on_disk, tmp_path, steps=3, optim={"lr": 1e-2}, **STAGES[name])
    if name in ("forward", "jsd"):
        rows = carry_out(ctx)
        assert all(0 < r["divergence"] < 20 and "skipped" not in r for r in rows)
        assert rows[-1]["divergence"] < rows[0]["divergence"]
        return
    with pytest.raises(StageFailed, match="teacher teacher") as caught:
        carry_out(ctx)
    assert any(word in caught.value.hint for word in ("forward", "leave"))


def test_a_number_that_is_not_one_decides_nothing():
    nan = math.nan
    for touches in (True, False):
        condition = Condition("c", lambda scores: scores, least=0.0, touches=touches)
        assert verdict(condition, 1.0, 0.5, 1.5) is True
        assert verdict(condition, -1.0, -1.5, -0.5) is False
        for numbers in itertools.product((1.0, nan), (-1.0, nan), (-0.5, nan)):
            if any(map(math.isnan, numbers)):
                assert verdict(condition, *numbers) is None
