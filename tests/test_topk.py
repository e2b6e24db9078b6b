"""Top-k forms: golden numbers, bounds, equality at k = V, and what each one is unbiased for."""

import itertools
import math

import pytest
import torch
from test_chunks import CPU, LEVELS, columns_of, head_of, plain_logits, tensor

from opdctl.kernels import reference
from opdctl.kernels.head import Head
from opdctl.kernels.topk import among, divergence_on, overlap_ratio, union
from opdctl.loss.objectives.divergence import Divergence
from opdctl.loss.objectives.topk_pg import TopkPg
from opdctl.loss.objectives.topk_tail import TopkTail
from opdctl.loss.token_view import LossTerm, weighted_sum
from opdctl.scoring.quantities import list_entropy
from opdctl.scoring.teacher_cache import CachedTeacher, TeacherCache, lookup

S = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
T = torch.tensor([[0.2, 0.6, 0.05, 0.15]], dtype=torch.float64).log()
FORMS = ("tail", "generalised", "renormalised")


def on(ids, form, direction="reverse", beta=0.5):
    keep = torch.ones(1, len(ids), dtype=torch.bool)
    tails = tails_of(S, T, torch.tensor([ids]))
    return float(divergence_on(S[:, ids], T[:, ids], keep, form, direction, beta, tails))


def tails_of(log_p, log_q, ids):
    return tuple((1 - x.gather(-1, ids).exp().sum(-1)).log() for x in (log_p, log_q))


def test_golden_numbers():
    full = {("forward", 0.5): 0.342491, ("reverse", 0.5): 0.360062}
    full |= {("jsd", 0.1): 0.030598, ("jsd", 0.5): 0.084854, ("jsd", 0.9): 0.031818}
    for (direction, beta), value in full.items():
        assert float(reference.divergence(S, T, direction, beta)) == pytest.approx(value, abs=1e-6)
    assert on([0, 1], "tail", "jsd") == pytest.approx(0.058692, abs=1e-6)
    assert on([0, 1], "tail") == pytest.approx(0.250201, abs=1e-6)
    assert on([0], "tail") == pytest.approx(0.223144, abs=1e-6)
    assert on([0], "generalised") == pytest.approx(0.158145, abs=1e-6)
    assert on([0], "renormalised") == pytest.approx(0, abs=1e-12)
    logits = S.clone().requires_grad_()
    log_p = logits.log_softmax(-1)
    reference.divergence(log_p, T, "forward").backward()
    assert torch.allclose(logits.grad, torch.tensor([[0.3, -0.3, 0.1, -0.1]]).double())


@pytest.mark.parametrize(("direction", "beta"), [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.3)])
def test_bounds(direction, beta):
    """Tail and generalised never exceed the full divergence; renormalised can."""
    p, q = (tensor(300, 12, seed=i, scale=3).log_softmax(-1) for i in (0, 1))
    full = reference.divergence(p, q, direction, beta)
    ids = p.topk(3).indices
    keep = torch.ones_like(ids, dtype=torch.bool)
    both, tails = (p.gather(-1, ids), q.gather(-1, ids), keep), tails_of(p, q, ids)
    found = {form: divergence_on(*both, form, direction, beta, tails) for form in FORMS}
    for form in ("tail", "generalised"):
        assert (found[form] <= full + 1e-12).all() and (found[form] >= 0).all()
        assert (full - found[form]).mean() > 0.01
    assert (found["renormalised"] > full).any() and (found["renormalised"] >= 0).all()


def test_union_counts_an_id_once():
    ids, keep = union(torch.tensor([[4, 7]]), torch.tensor([[7, 9]]))
    assert ids.tolist() == [[4, 7, 7, 9]] and keep.tolist() == [[True, True, False, True]]


N, V, D, E = 9, 23, 6, 4


def pair(large=False):
    """A student's rows and head, and two teachers of unequal width; ids may outnumber a product."""
    hidden, head = tensor(N, D, seed=1).requires_grad_(), head_of(V, D, 2, trained=True)
    teachers = []
    for count, width, seed in ((5, E, 3), (N - 5, E - 1, 5)):
        rows, other = tensor(count, width, seed=seed), head_of(V + 3, width, seed + 20, valid=V)
        logits = plain_logits(rows, other)[:, :V]
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        top = logits.topk(V if large else 5, dim=-1).indices
        teachers.append(CachedTeacher(other, rows, logits.logsumexp(-1), top, entropy))
    return hidden, head, TeacherCache(teachers, CPU)


def run(objective, hidden, head, taught, target=None, weight=None, level="chunked", size=4):
    weight = torch.ones(N, dtype=torch.float64) if weight is None else weight
    return weighted_sum(
        hidden,
        head,
        torch.arange(N) if target is None else target,
        columns_of(torch.tensor([0] * 5 + [1] * (N - 5))),
        [(LossTerm(objective), weight)],
        rows_of=LEVELS[level],
        size=size,
        teacher_cache=taught,
    )


def probabilities(hidden, head, taught):
    p = plain_logits(hidden, head).log_softmax(-1)
    q = torch.cat([plain_logits(h.hidden_ND, h.head)[:, :V] for h in taught.held]).log_softmax(-1)
    return p, q


SUPPORTS = ("topk_student", "topk_teacher", "topk_union")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("support", "form"), list(itertools.product(SUPPORTS, FORMS)))
@pytest.mark.parametrize(("direction", "beta"), [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.3)])
def test_equals_plain_autograd(level, support, form, direction, beta):
    """k = 2 of width 4 reads rows of the head; the union of k = 5 takes the whole product."""
    for k in (2, 5):
        hidden, head, taught = pair()
        keys = {"support": support, "k": k, "form": form, "direction": direction, "beta": beta}
        objective = Divergence(Divergence.Config(**keys))
        total, table = run(objective, hidden, head, taught, level=level)
        total.backward()
        ours = [hidden.grad, head.weight_VD.grad]
        p, q = probabilities(hidden, head, taught)
        each = []
        for n in range(N):
            mine, theirs = (set(x[n].topk(k).indices.tolist()) for x in (p, q))
            sides = {SUPPORTS[0]: mine, SUPPORTS[1]: theirs, SUPPORTS[2]: mine | theirs}
            each.append(by_definition(p[n], q[n], sorted(sides[support]), form, direction, beta))
        expected = torch.autograd.grad(sum(each), [hidden, head.weight_VD])
        assert torch.allclose(table["divergence"], torch.stack(each).detach(), atol=1e-12)
        for a, b in zip(ours, expected, strict=True):
            assert b.norm() > 1e-3 and (a - b).abs().max() < 1e-12


def by_definition(log_p, log_q, ids, form, direction, beta):
    p, q = log_p[ids].exp(), log_q[ids].exp()
    if form == "tail":
        p, q = (torch.cat([x, 1 - x.sum(0, keepdim=True)]) for x in (p, q))
    elif form == "renormalised":
        p, q = p / p.sum(), q / q.sum()

    def gkl(a, b):
        return (a * (a / b).log() - a + b).sum()

    m = beta * q + (1 - beta) * p
    return {
        "reverse": lambda: gkl(p, q),
        "forward": lambda: gkl(q, p),
        "jsd": lambda: beta * gkl(q, m) + (1 - beta) * gkl(p, m),
    }[direction]()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
def test_k_of_the_whole_vocabulary_is_the_full_divergence(form, direction):
    grads = []
    for keys in ({}, {"support": "topk_student", "form": form, "k": V}):
        hidden, head, taught = pair(large=True)
        config = Divergence.Config(direction=direction, beta=0.3, **keys)
        total, _ = run(Divergence(config), hidden, head, taught)
        total.backward()
        grads.append((total.detach(), hidden.grad, head.weight_VD.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def expected_gradient(objective):
    """Exact expectation over the sampled token: every token of the vocabulary, weighted by p."""
    hidden, head, taught = pair()
    p = probabilities(hidden, head, taught)[0].exp().detach()
    value = torch.zeros(N, dtype=torch.float64)
    for v in range(V):
        weight = p[:, v].clone()
        total, table = run(objective, hidden, head, taught, torch.full((N,), v), weight)
        total.backward()
        for name in ("divergence_estimate", "divergence"):
            value += weight * table.get(name, 0)
    return value, hidden.grad, head.weight_VD.grad


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_topk_tail_is_unbiased(support, k):
    exact = expected_gradient(Divergence(Divergence.Config()))
    ours = expected_gradient(TopkTail(TopkTail.Config(support=support, k=k)))
    for a, b in zip(ours, exact, strict=True):
        assert b.norm() > 1e-2 and (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("weighting", ["student", "teacher", "none"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_topk_pg_by_hand(support, weighting):
    """Gradient of the logits: sum over the ids of -w A (onehot - p)."""
    hidden, head, taught = pair()
    keys = {"support": support, "k": 3, "weighting": weighting}
    total, _ = run(TopkPg(TopkPg.Config(**keys)), hidden, head, taught)
    total.backward()
    log_p, log_q = (x.detach() for x in probabilities(hidden, head, taught))
    logits_grad = torch.zeros(N, V, dtype=torch.float64)
    for n in range(N):
        mine, theirs = (set(x[n].topk(3).indices.tolist()) for x in (log_p, log_q))
        sides = {SUPPORTS[0]: mine, SUPPORTS[1]: theirs, SUPPORTS[2]: mine | theirs}
        ids = sorted(sides[support])
        side = {"student": log_p, "teacher": log_q, "none": torch.zeros(N, V)}[weighting][n, ids]
        w = side.exp() / side.exp().sum() if weighting != "none" else side.exp()
        for v, share in zip(ids, w.tolist(), strict=True):
            advantage = float(log_q[n, v] - log_p[n, v])
            logits_grad[n] -= share * advantage * (torch.eye(V)[v] - log_p[n].exp())
    assert torch.allclose(hidden.grad, logits_grad @ head.weight_VD.detach(), atol=1e-10)


def test_topk_pg_at_k_of_the_whole_vocabulary_is_the_reverse_kl_gradient():
    grads = []
    for objective in (TopkPg(TopkPg.Config(k=V)), Divergence(Divergence.Config())):
        hidden, head, taught = pair(large=True)
        run(objective, hidden, head, taught)[0].backward()
        grads.append((hidden.grad, head.weight_VD.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_gathered_rows_of_the_head_are_its_logits():
    for keys in ({}, {"softcap": 2.0, "temperature": 0.7, "bias": True}):
        head, hidden = head_of(40, 6, 3, **keys), tensor(5, 6)
        ids = torch.randint(0, 40, (5, 4), generator=torch.Generator().manual_seed(0))
        assert torch.allclose(head.at(hidden, ids), head.logits(hidden).gather(-1, ids), atol=1e-12)
    assert math.isfinite(float(head.at(hidden, ids).sum()))


@pytest.mark.parametrize("level", [*LEVELS, "triton"])
@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
def test_the_tail_of_a_confident_token_is_exact(level, direction):
    """fp32 near convergence at p = .99999: the gradient of the tail is not lost to 1 - sum p."""
    from opdctl.kernels import triton_rows
    from opdctl.loss.token_view import TokenView

    logits = tensor(8, 300, seed=0, scale=1.0)
    logits[:, 7] = logits.logsumexp(-1) + 11.5
    other = logits + 0.05 * tensor(8, 300, seed=1)
    objective = Divergence(Divergence.Config(support="topk_student", k=4, direction=direction))

    def gradient(dtype, made):
        z, t = logits.to(dtype), other.to(dtype)
        rows = made(z.clone(), dtype)
        top = t.topk(4, dim=-1).indices
        head, entropy = Head(torch.eye(300, dtype=dtype), 300), torch.zeros(8, dtype=dtype)
        held = CachedTeacher(head, t, t.logsumexp(-1), top, entropy)
        columns = columns_of(torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=dtype))
        chunk = type("Chunk", (), {"rows": rows, "head": head})()
        with torch.enable_grad():
            view = TokenView(chunk, torch.full((8,), 7), columns, TeacherCache([held], CPU))
            total = objective.loss(view).sum()
        grads = torch.autograd.grad(total, rows.leaves, allow_unused=True)
        return rows.gradient(list(grads))[0].double()

    made = triton_rows.Rows if level == "triton" else LEVELS[level]
    expected = gradient(torch.float64, reference.Rows)
    gap = (gradient(torch.float32, made) - expected).norm() / expected.norm()
    assert expected.abs().sum() > 0 and gap < 5e-3


def test_overlap_is_the_share_of_ids_that_both_sides_have():
    """Order does not matter; a set of which nothing is shared has 0, an equal one 1."""
    ours_CK = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 3, 2, 0]])
    theirs_CK = torch.tensor([[4, 1, 9, 0], [1, 2, 3, 4], [0, 9, 3, 2]])
    assert overlap_ratio(ours_CK, theirs_CK).tolist() == [0.5, 0.0, 1.0]
    assert among(theirs_CK, ours_CK)[0].tolist() == [True, True, False, False]
    assert among(ours_CK, theirs_CK)[0].tolist() == [True, False, False, True]


def test_a_list_gives_its_log_probs_the_mass_outside_and_a_bound_of_the_entropy():
    """Against the whole distribution in float64; the list itself is in fp32, as a server's is."""
    torch.manual_seed(0)
    logq_NV = torch.randn(5, 40, dtype=torch.float64).log_softmax(-1)
    top_NK, ids_NK = logq_NV.topk(8)
    target_N1 = torch.randint(40, (5, 1))
    listed_NJ = torch.cat([logq_NV.gather(-1, target_N1), top_NK], -1).float()
    given = (torch.cat([target_N1, ids_NK], -1), listed_NJ)
    found_NK, tail_N = lookup(*given, ids_NK.flip(-1), ids_NK)
    outside_N = logq_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1)
    assert (found_NK - top_NK.flip(-1)).abs().max() < 1e-6
    assert (tail_N - outside_N).abs().max() < 1e-6
    bucket_N = -(top_NK.exp() * top_NK).sum(-1) - outside_N.exp() * outside_N
    assert (list_entropy(top_NK.float()) - bucket_N).abs().max() < 1e-6
    assert (bucket_N < -(logq_NV.exp() * logq_NV).sum(-1)).all()
    sure = torch.tensor([[0.0, 0.0, -30.0]])  # what the list leaves of 1 cannot be told from 0
    assert lookup(torch.tensor([[3, 3, 1]]), sure, *[torch.tensor([[3, 1]])] * 2)[1] > -14
    with pytest.raises(AssertionError):
        lookup(*given, torch.full((5, 1), 41), None)
