"""The Triton kernels' own source, run by Triton's interpreter on a CPU (compiled where CUDA is)."""

import pytest
import torch
from test_chunks import columns_of, tensor

from opdctl.errors import UsageError
from opdctl.kernels import chunked, reference, triton_rows
from opdctl.kernels.head import Head
from opdctl.kernels.select import rows_class
from opdctl.loss.objectives.divergence import Divergence
from opdctl.loss.objectives.policy_gradient import PolicyGradient
from opdctl.loss.token_view import LossTerm, weighted_sum
from opdctl.scoring.teacher_cache import CachedTeacher, TeacherCache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.3), ("jsd", 0.0), ("jsd", 1.0)]


def logits(*shape, seed, scale=4.0):
    return tensor(*shape, seed=seed, dtype=torch.float32, scale=scale).to(DEVICE)


@pytest.mark.parametrize("vocab", [1, 5, 16, 129])
@pytest.mark.parametrize(("direction", "beta"), WAYS)
@pytest.mark.parametrize("noise", [4.0, 1e-3, 0.0])
def test_equals_the_torch_level(monkeypatch, vocab, direction, beta, noise):
    """Vocabularies that blocks do not divide, alone and with log-probs at ids added."""
    monkeypatch.setattr(triton_rows, "BLOCK", 16)
    z = logits(5, vocab, seed=0)
    t = z + logits(5, vocab, seed=1, scale=noise)
    ids = torch.arange(10, device=DEVICE).view(5, 2) % vocab
    weight, picked = logits(5, seed=2), logits(5, 2, seed=3)
    for with_ids in (False, True):
        found = []
        for level in (chunked, triton_rows):
            rows = level.Rows(z.clone(), torch.float32)
            value, entropy, logq = rows.divergence(t.clone(), direction, beta, ids)
            grads = [weight, picked] if with_ids else [weight]
            logp = rows.at(ids, leaf=with_ids)
            assert value.min() >= 0 and (noise or value.abs().max() == 0)
            own = rows.entropy()
            gradient, factor = rows.gradient(grads)
            gradient = gradient if factor is None else gradient * factor[:, None]
            found.append([x.detach() for x in (value, entropy, logq, logp, own, gradient)])
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def test_log_probs_alone(monkeypatch):
    """Without a teacher: what nll, the policy gradient and every top-k form go through."""
    monkeypatch.setattr(triton_rows, "BLOCK", 16)
    z, ids = logits(6, 45, seed=0), torch.arange(12, device=DEVICE).view(6, 2)
    rows, plain = triton_rows.Rows(z.clone(), torch.float32), z.double().requires_grad_()
    logp, grad = rows.at(ids), logits(6, 2, seed=1)
    log_p = plain.log_softmax(-1)
    expected = torch.autograd.grad((log_p.gather(-1, ids) * grad).sum(), plain)[0]
    assert torch.allclose(logp.double(), log_p.gather(-1, ids), atol=1e-5)
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert torch.allclose(rows.entropy().double(), entropy, atol=1e-5)
    assert torch.allclose(rows.gradient([grad])[0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("with_teacher", [False, True])
def test_low_precision_operands_round_once(with_teacher):
    """Confident tokens, where a p and what is added at the id cancel: only the sum is rounded."""
    z = logits(6, 60, seed=0, scale=1.0)
    z[torch.arange(6), torch.arange(6)] = 12.0  # p about .9995
    ids, grad = torch.arange(6, device=DEVICE)[:, None], torch.ones(6, 1, device=DEVICE)
    found = []
    for level in (chunked, triton_rows):
        rows = level.Rows(z.clone(), torch.bfloat16)
        rows.at(ids)
        grads = [grad]
        if with_teacher:
            rows.divergence(logits(6, 60, seed=1), "reverse", 0.5, ids)
            grads.append(1e-3 * torch.ones(6, device=DEVICE))
        found.append(rows.gradient(grads)[0].float())
    gap = (found[0] - found[1]).norm(dim=-1) / found[0].norm(dim=-1)
    assert gap.max() < 4e-3


def test_extreme_logits(monkeypatch):
    """Rows far apart: probabilities that underflow add nothing, and nothing is NaN."""
    monkeypatch.setattr(triton_rows, "BLOCK", 16)
    z, t = logits(4, 40, seed=0, scale=60.0), logits(4, 40, seed=1, scale=60.0)
    for direction, beta in WAYS:
        ids = torch.zeros(4, 1, dtype=torch.long, device=DEVICE)
        rows = triton_rows.Rows(z.clone(), torch.float32)
        value = rows.divergence(t.clone(), direction, beta, ids)[0].detach()
        exact = reference.divergence(
            z.double().log_softmax(-1), t.double().log_softmax(-1), direction, beta
        )
        assert torch.allclose(value.double(), exact, rtol=1e-4, atol=1e-5)
        assert torch.isfinite(rows.gradient([torch.ones(4, device=DEVICE)])[0]).all()


@pytest.mark.parametrize("both", [False, True])
def test_whole_loss_in_chunks(both):
    """Head, chunks, softcap, padded ids and two objectives through the kernels, against torch."""
    found = []
    for level in (chunked.Rows, triton_rows.Rows):
        hidden = logits(7, 8, seed=1, scale=1.0).requires_grad_()
        weight = logits(40, 8, seed=2, scale=1.0).requires_grad_()
        bias = logits(40, seed=9, scale=1.0).requires_grad_()
        other = Head(logits(37, 6, seed=3, scale=1.0), 33, softcap=3.0, temperature=0.8)
        taught = TeacherCache([CachedTeacher(other, logits(7, 6, seed=4, scale=1.0))], DEVICE)
        columns = columns_of(torch.zeros(7, dtype=torch.long))
        columns["advantage"] = tensor(7, seed=5, dtype=torch.float32)
        columns["pair_weight"] = torch.ones(7)
        columns = {name: column.to(DEVICE) for name, column in columns.items()}
        terms = [(LossTerm(Divergence(Divergence.Config(k=4))), logits(7, seed=6).abs())]
        if both:
            objective = PolicyGradient(PolicyGradient.Config())
            terms.append((LossTerm(objective), logits(7, seed=7).abs()))
        total, table = weighted_sum(
            hidden,
            Head(weight, 33, bias, softcap=3.0, temperature=0.8),
            torch.arange(7, device=DEVICE),
            columns,
            terms,
            rows_of=level,
            size=3,
            teacher_cache=taught,
        )
        total.backward()
        found.append(
            [
                total.detach(),
                hidden.grad,
                weight.grad,
                bias.grad,
                *(table[n] for n in sorted(table)),
            ]
        )
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-4)


def test_selection_is_automatic_and_can_be_forced():
    cpu = torch.device("cpu")
    assert rows_class("auto", cpu).name == "chunked"
    assert rows_class("reference", cpu).name == "reference"
    assert rows_class("triton", cpu).name == "triton"  # under the interpreter
    assert rows_class("auto", torch.device("cuda")).name == "triton"
    assert rows_class("auto", torch.device("cuda"), torch.float64).name == "chunked"
    with pytest.raises(UsageError, match=r"float64"):
        rows_class("triton", cpu, torch.float64)
