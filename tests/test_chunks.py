"""The chunk loop and its levels: bounded memory, exact gradients, every head a model may have."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opdctl.kernels import chunked, reference
from opdctl.kernels.chunks import rows_in
from opdctl.kernels.head import Head
from opdctl.loss.objectives.divergence import Divergence
from opdctl.loss.objectives.hidden import Hidden
from opdctl.loss.objectives.nll import Nll
from opdctl.loss.objectives.policy_gradient import PolicyGradient
from opdctl.loss.objectives.sampled_kl import SampledKl
from opdctl.loss.objectives.topk_pg import TopkPg
from opdctl.loss.objectives.topk_tail import TopkTail
from opdctl.loss.token_view import LossTerm, weighted_sum
from opdctl.scoring.teacher_cache import CachedTeacher, TeacherCache

LEVELS = {"chunked": chunked.Rows, "reference": reference.Rows}
CPU = torch.device("cpu")


def tensor(*shape, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def head_of(vocab, width, seed, *, dtype=torch.float64, trained=False, bias=False, **keys):
    weight = tensor(vocab, width, seed=seed, dtype=dtype, scale=2 * width**-0.5)
    bias = tensor(vocab, seed=seed + 1, dtype=dtype).requires_grad_(trained) if bias else None
    return Head(weight.requires_grad_(trained), keys.pop("valid", vocab), bias, **keys)


def columns_of(index, weight=None):
    row = torch.zeros_like(index)
    for i in index.unique():
        row[index == i] = torch.arange(int((index == i).sum()))
    weight = torch.ones(len(index), dtype=torch.float64) if weight is None else weight
    weights = {"pair_weight": weight, "teacher_weight": weight}
    return {"teacher_index": index, "teacher_row": row, **weights}


def divergence(hidden, head, taught, columns, weight, *, level="chunked", size=3, **keys):
    config = Divergence.Config(**{"overlap": False, **keys})
    target = torch.arange(len(hidden)) % head.valid_V
    return weighted_sum(
        hidden,
        head,
        target,
        columns,
        [(LossTerm(Divergence(config)), weight)],
        rows_of=LEVELS[level],
        size=size,
        teacher_cache=taught,
    )


def plain_logits(hidden, head):
    """A head by its definition: factor, softcap, temperature; invalid ids at -inf."""
    logits = hidden @ head.weight_VD.T + (0 if head.bias_V is None else head.bias_V)
    logits = logits * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    invalid = torch.arange(logits.shape[-1]) >= head.valid_V
    return (logits / head.temperature).masked_fill(invalid, -torch.inf)


def plain(hidden, head, teacher_hidden, teacher_head, beta):
    """GKD's divergence by its formula over the valid ids, autograd all the way. Shape [N]."""
    p = plain_logits(hidden, head).softmax(-1)[:, : head.valid_V]
    q = plain_logits(teacher_hidden, teacher_head).detach().softmax(-1)[:, : head.valid_V]
    if beta == 0:
        return (q * (q.log() - p.log())).sum(-1)
    if beta == 1:
        return (p * (p.log() - q.log())).sum(-1)
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)


GRID = list(
    itertools.product(
        (0.0, 0.3, 0.5, 1.0),
        ((1.0, None, 1.0), (0.7, None, 1.3), (1.0, 3.0, 1.0), (2.0, 3.0, 0.6)),
        (False, True),
    )
)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("beta", "scaling", "bias"), GRID)
def test_equals_float64_autograd(level, beta, scaling, bias):
    """Temperature, factor, softcap, bias, padded vocabularies, unequal sizes, weights."""
    temperature, softcap, scale = scaling
    keys = {"temperature": temperature, "softcap": softcap, "scale": scale}
    keys |= {"bias": bias, "valid": 29}
    hidden = tensor(11, 8, seed=1).requires_grad_()
    head = head_of(31, 8, 2, trained=True, **keys)
    teachers = [(tensor(7, 12, seed=5), head_of(37, 12, 6, **keys))]
    teachers.append((tensor(4, 5, seed=7), head_of(29, 5, 8, **keys)))
    index = torch.tensor([0] * 7 + [1] * 4)
    weight = torch.tensor([0.3, 1, 0, 2, 0.1, 0, 1, 1, 0.5, 0, 1], dtype=torch.float64)
    taught = TeacherCache([CachedTeacher(h, rows) for rows, h in teachers], CPU)
    total, table = divergence(
        hidden,
        head,
        taught,
        columns_of(index),
        weight,
        level=level,
        direction="jsd",
        beta=beta,
    )
    (2.5 * total).backward()  # an upstream factor
    leaves = [hidden, head.weight_VD, *([head.bias_V] if bias else [])]
    ours = [leaf.grad for leaf in leaves]
    parts = [slice(0, 7), slice(7, 11)]
    each = torch.cat(
        [plain(hidden[p], head, *t, beta) for p, t in zip(parts, teachers, strict=True)]
    )
    expected = torch.autograd.grad(2.5 * (weight * each).sum(), leaves)
    assert torch.allclose(table["divergence"], each.detach(), atol=1e-12, rtol=0)
    assert float(total.detach()) == pytest.approx(float((weight * each).sum().detach()), abs=1e-12)
    for a, b in zip(ours, expected, strict=True):
        assert b.norm() > 1e-3 and (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("level", LEVELS)
def test_the_table_of_a_token(level):
    """Entropies, log-probs of the target on both sides, overlap of an eighth and its mass."""
    hidden, head = tensor(5, 8, seed=1), head_of(32, 8, 2)
    rows, other = tensor(5, 6, seed=3), head_of(32, 6, 4)
    taught = TeacherCache([CachedTeacher(other, rows)], CPU)
    columns = columns_of(torch.zeros(5, dtype=torch.long))
    _, table = divergence(
        hidden.requires_grad_(),
        head,
        taught,
        columns,
        torch.ones(5),
        level=level,
        overlap=True,
    )
    p, q = (plain_logits(*pair).softmax(-1).detach() for pair in ((hidden, head), (rows, other)))
    for name, mass in (("entropy", p), ("teacher_entropy", q)):
        assert torch.allclose(table[name], -(mass * mass.log()).sum(-1), atol=1e-12)
    at = torch.arange(5)
    assert torch.allclose(table["student_logprob"], p[at, at].log(), atol=1e-12)
    assert torch.allclose(table["teacher_logprob"], q[at, at].log(), atol=1e-12)
    for n in at.tolist():
        both = set(p[n].topk(4).indices.tolist()) & set(q[n].topk(4).indices.tolist())
        assert table["overlap"][n] == len(both) / 4
        assert float(table["overlap_mass"][n]) == pytest.approx(float(p[n, list(both)].sum()))
        mass = float(q[n, list(both)].sum())
        assert float(table["overlap_teacher_mass"][n]) == pytest.approx(mass)
    assert 0 < float(table["overlap"].mean()) < 1


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gave, in elements, and the total kept by autograd."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, torch.Tensor):
                self.numel = max(self.numel, item.untyped_storage().nbytes() // item.itemsize)
        return out


@pytest.mark.parametrize("objective", ["divergence", "nll", "policy_gradient", "hidden"])
@pytest.mark.parametrize("trained", [True, False])
def test_no_tensor_grows_with_tokens_times_vocabulary(objective, trained):
    """Neither saved for backward nor made on the way; a frozen head has no gradient either."""
    N, V, D, size = 96, 500, 8, 6
    hidden = tensor(N, D, seed=1).requires_grad_()
    head = head_of(V, D, 2, trained=trained)
    columns = columns_of(torch.zeros(N, dtype=torch.long)) | {"advantage": tensor(N, seed=9)}
    taught = TeacherCache([CachedTeacher(head_of(V, D, 4), tensor(N, D, seed=3))], CPU)
    made = {
        "divergence": Divergence,
        "nll": Nll,
        "policy_gradient": PolicyGradient,
        "hidden": Hidden,
    }[objective]
    terms = [(LossTerm(made(made.Config())), torch.ones(N))]
    target, kept = torch.arange(N), []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    )
    with Largest() as largest, hooks:
        total, _ = weighted_sum(
            hidden,
            head,
            target,
            columns,
            terms,
            rows_of=chunked.Rows,
            size=size,
            teacher_cache=taught,
        )
        total.backward()
    assert max(kept) <= N * D  # of tokens x hidden, never tokens x vocabulary
    assert largest.numel <= max(size * V, V * D, chunked.BLOCK)
    assert 3 * largest.numel < N * V or largest.numel == chunked.BLOCK
    if objective == "hidden":  # the head is left alone: nothing as large as a row of logits times C
        assert largest.numel <= N * D and head.weight_VD.grad is None
    else:
        assert (head.weight_VD.grad is not None) == trained
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("unit", [False, True])
def test_hidden_rows_alone_and_beside_the_head(unit):
    """The distance of hidden rows by autograd; with nll in the same chunks, the sum of both."""
    rows, weight = tensor(9, 8, seed=3), tensor(9, seed=4).abs()
    taught = TeacherCache([CachedTeacher(head_of(20, 8, 4), rows)], CPU)
    for beside in (False, True):
        hidden, head = tensor(9, 8, seed=1).requires_grad_(), head_of(20, 8, 2, trained=True)
        terms = [(LossTerm(Hidden(Hidden.Config(unit=unit))), weight)]
        terms += [(LossTerm(Nll(Nll.Config())), weight)] if beside else []
        columns, target = columns_of(torch.zeros(9, dtype=torch.long)), torch.arange(9)
        total, _ = weighted_sum(
            hidden, head, target, columns, terms, rows_of=chunked.Rows, size=4, teacher_cache=taught
        )
        total.backward()
        ours = hidden.grad, head.weight_VD.grad
        a, b = hidden, rows
        if unit:
            a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
        expected = (weight * (a - b).square().mean(-1)).sum()
        if beside:
            log_p = (hidden @ head.weight_VD.T).log_softmax(-1)
            expected = expected - (weight * log_p[target, target]).sum()
        hidden.grad = head.weight_VD.grad = None
        expected.backward()
        assert torch.allclose(ours[0], hidden.grad, atol=1e-12)
        assert float(total.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
        if beside:
            assert torch.allclose(ours[1], head.weight_VD.grad, atol=1e-12)
        else:
            assert ours[1] is None


def together():
    """Objectives that read the teacher, log-probs or hidden rows, with their columns."""
    top = {"k": 5, "support": "topk_union"}
    return {
        "divergence": Divergence(Divergence.Config(k=5)),
        "top": Divergence(Divergence.Config(direction="forward", **top)),
        "topk_pg": TopkPg(TopkPg.Config(k=5)),
        "topk_tail": TopkTail(TopkTail.Config(k=5)),
        "hidden": Hidden(Hidden.Config()),
        "policy_gradient": PolicyGradient(PolicyGradient.Config()),
        "sampled_kl": SampledKl(SampledKl.Config()),
    }


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("wide", [False, True])
def test_two_objectives_in_one_pass_are_the_sum_of_each(level, wide):
    """In either order: nothing one leaves in a buffer changes the other."""
    vocab = 200 if wide else 20  # top-k ids are read from rows of the head, or from a product
    rows, other = tensor(7, 8, seed=3), head_of(vocab, 8, 4)
    logits = plain_logits(rows, other)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    held = CachedTeacher(other, rows, logits.logsumexp(-1), logits.topk(5).indices, entropy)
    columns = columns_of(torch.zeros(7, dtype=torch.long))
    columns |= {"advantage": tensor(7, seed=5), "teacher": -tensor(7, seed=6).abs()}
    weight = tensor(7, seed=7).abs()

    def gradient(names):
        hidden, head = tensor(7, 8, seed=1).requires_grad_(), head_of(vocab, 8, 2, trained=True)
        total, _ = weighted_sum(
            hidden,
            head,
            torch.arange(7),
            columns,
            [(LossTerm(together()[name]), weight) for name in names],
            rows_of=LEVELS[level],
            size=3,
            teacher_cache=TeacherCache([held], CPU),
        )
        total.backward()
        of_head = head.weight_VD.grad
        assert (of_head is None) == (names == ["hidden"])
        of_head = torch.zeros_like(head.weight_VD) if of_head is None else of_head
        return torch.cat([hidden.grad.flatten(), of_head.flatten()])

    alone = {name: gradient([name]) for name in together()}
    for a, b in itertools.permutations(together(), 2):
        if {a, b} == {"divergence", "top"}:
            continue  # one name in a recipe: they are never together
        expected = alone[a] + alone[b]
        assert expected.norm() > 1e-2
        assert (gradient([a, b]) - expected).abs().max() < 1e-12, (a, b)


def test_the_gradient_can_be_taken_once():
    hidden, head = tensor(4, 8).requires_grad_(), head_of(9, 8, 2, trained=True)
    terms = [(LossTerm(Nll(Nll.Config())), torch.ones(4))]
    total, _ = weighted_sum(hidden, head, torch.arange(4), {}, terms, rows_of=chunked.Rows, size=2)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


def test_chunk_size_comes_from_a_budget():
    small, large = head_of(1000, 4, 0, dtype=torch.float32), head_of(9000, 4, 0)
    assert rows_in(12, small) == (12 << 20) // (1000 * 4 * 3)
    assert rows_in(0, small) == (256 << 20) // (1000 * 4 * 3)
    assert rows_in(1, large) == (1 << 20) // (9000 * 8 * 3)
    assert rows_in(1, head_of(10**6, 1, 0, dtype=torch.float32)) == 1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5, 0.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_never_negative_and_exact_near_convergence(level, noise, beta):
    """fp32 close to the teacher: no divergence below zero, and the small ones are right."""
    logits = tensor(200, 300, seed=0, dtype=torch.float32, scale=4)
    other = logits + noise * tensor(200, 300, seed=1, dtype=torch.float32)
    rows = LEVELS[level](logits.clone())
    value, _, _ = rows.divergence(other.clone(), "jsd", beta, torch.zeros(200, 1, dtype=torch.long))
    exact = reference.divergence(
        logits.double().log_softmax(-1), other.double().log_softmax(-1), "jsd", beta
    )
    assert value.min() >= 0
    if noise == 0:
        assert value.abs().max() == 0
    else:
        assert ((value.double() - exact).abs() < 2e-3 * exact + 1e-12).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_share_no_mass(level, dtype):
    """Probabilities that underflow add nothing and nothing is NaN; a jsd reaches its maximum."""
    logits = torch.full((2, 50), -300.0, dtype=dtype)
    other = logits.clone()
    logits[:, 3] = other[:, 7] = 300.0
    for beta, most in ((0.0, 600.0), (1.0, 600.0), (0.5, 0.693147), (0.3, 0.610864)):
        rows, ids = LEVELS[level](logits.clone()), torch.tensor([[3], [7]])
        value, _, _ = rows.divergence(other.clone(), "jsd", beta, ids)
        assert value.tolist() == pytest.approx([most] * 2, rel=1e-5)
        grads = torch.autograd.grad(value.sum(), rows.leaves, allow_unused=True)
        assert torch.isfinite(rows.gradient(list(grads))[0]).all()


def test_low_precision_operands_keep_fp32_logits():
    """bf16 operands near convergence: .4 % with bf16 gradients, .2 % with fp32 ones; with logits
    rounded to bf16, as most frameworks have them, ten times worse."""
    hidden64 = tensor(64, 32, seed=1).bfloat16().double()
    weight64 = tensor(2000, 32, seed=2, scale=0.7).bfloat16().double()
    teacher64 = (hidden64 + 0.05 * tensor(64, 32, seed=3)).bfloat16().double()

    def gradients(dtype, rounded=False):
        hidden = hidden64.to(dtype).clone().requires_grad_()
        weight = weight64.to(dtype).clone().requires_grad_()
        taught = TeacherCache(
            [CachedTeacher(Head(weight64.to(dtype), 2000), teacher64.to(dtype))], CPU
        )
        taught.held[0].head.rounded = rounded
        columns = columns_of(torch.zeros(64, dtype=torch.long))
        head = Head(weight, 2000, rounded=rounded)
        total, _ = divergence(hidden, head, taught, columns, torch.ones(64) / 64, size=20)
        total.backward()
        return [g.grad.double() for g in (hidden, weight)]

    def errors(found):
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    exact = gradients(torch.float64)
    assert max(errors(gradients(torch.float32))) < 2e-3
    assert max(errors(gradients(torch.bfloat16))) < 4e-3
    assert min(errors(gradients(torch.bfloat16, rounded=True))) > 4e-2


def test_invalid_ids_change_nothing():
    """Rows of the head beyond the tokenizer have no effect and no gradient, on either side."""
    found = []
    for fill in (0.0, 50.0):
        hidden, head = tensor(6, 8, seed=1).requires_grad_(), head_of(30, 8, 2, trained=True)
        other = head_of(40, 8, 4)
        with torch.no_grad():
            head.weight_VD[25:] = fill
            other.weight_VD[25:] = fill
        head.valid_V = other.valid_V = 25
        columns = columns_of(torch.zeros(6, dtype=torch.long))
        taught = TeacherCache([CachedTeacher(other, tensor(6, 8, seed=3))], CPU)
        total, _ = divergence(hidden, head, taught, columns, torch.ones(6))
        total.backward()
        assert head.weight_VD.grad[25:].abs().max() == 0
        found.append((total.detach(), hidden.grad, head.weight_VD.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_heads_are_loaded_once_per_teacher():
    """Rows in the order of their teachers: as many loads as teachers, whatever the chunks."""
    held = [CachedTeacher(head_of(30, 8, i), tensor(5, 8, seed=i)) for i in range(4)]
    index = torch.arange(4).repeat_interleave(5)
    for size in (1, 3, 20):
        taught = TeacherCache(held, CPU)
        hidden = tensor(20, 8, seed=9).requires_grad_()
        divergence(hidden, head_of(30, 8, 7), taught, columns_of(index), torch.ones(20), size=size)
        assert taught.loads == 4
