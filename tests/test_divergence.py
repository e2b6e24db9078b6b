"""Full-vocabulary divergences against plain float64 autograd, several teachers, chunks, masks."""

import itertools
import math

import pytest
import torch
from test_update import gradient, spans_of

from conftest import make_model, make_model64
from opdctl.kernels.reference import kl
from opdctl.loss.objectives.divergence import Divergence
from opdctl.scoring.asks import Asks, Pass
from opdctl.scoring.score import score
from opdctl.scoring.teacher_cache import CachedTeacher, TeacherCache
from opdctl.train import update


def objective(**keys):
    return [update.LossTerm(Divergence(Divergence.Config(**keys)), normalise="token_mean")]


def taught(spans, teachers, weights=(1.0, 1.0, 1.0), temperature=1.0):
    """Columns and teachers of spans that are taught in turn by its teachers."""
    lengths = [len(ids) - start for ids, start in spans]
    total = sum(lengths)
    columns = {
        "teacher_index": torch.zeros(total, 1, dtype=torch.long),
        "teacher_row": torch.zeros(total, 1, dtype=torch.long),
        "pair_weight": torch.ones(total, 1),
    }
    place = torch.arange(total).split(lengths)
    held = []
    for t, teacher in enumerate(teachers):
        mine = [i for i in range(len(spans)) if i % len(teachers) == t]
        requests = [spans[i] for i in mine]
        want = ("hidden", "lse", "topk", "entropy")
        found = score(teacher, requests, Asks.of(*want), Pass(temperature=temperature))
        at = torch.cat([place[i] for i in mine])
        columns["teacher_index"][at, 0] = t
        columns["teacher_row"][at, 0] = torch.arange(len(at))
        columns["pair_weight"][at, 0] = weights[t]
        rows = (found.hidden_ND, found.per_token["lse"], found.top_NK, found.per_token["entropy"])
        held.append(CachedTeacher(teacher.lm_head(temperature), *rows))
    return columns, TeacherCache(held, torch.device("cpu"))


def exact(student, spans, teachers, weights, temperature, direction, beta):
    """The same loss by materialised logits and plain autograd, token mean."""
    total, count = 0.0, 0
    for i, (ids, start) in enumerate(spans):
        rows = slice(start - 1, len(ids) - 1)
        log_p = (student.net(torch.tensor([ids])).logits[0, rows] / temperature).log_softmax(-1)
        teacher = teachers[i % len(teachers)]
        with torch.no_grad():
            log_q = (teacher.net(torch.tensor([ids])).logits[0, rows] / temperature).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        if direction == "reverse" or (direction == "jsd" and beta == 1):
            value = (p * (log_p - log_q)).sum()
        elif direction == "forward" or (direction == "jsd" and beta == 0):
            value = (q * (log_q - log_p)).sum()
        else:
            log_m = (beta * q + (1 - beta) * p).log()
            value = (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum()
        total = total + weights[i % len(teachers)] * value
        count += len(ids) - start
    return total / count


CASES = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.0), ("jsd", 0.3), ("jsd", 0.5), ("jsd", 1.0)]


@pytest.mark.parametrize(("direction", "beta"), CASES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_plain_autograd(model64, direction, beta, temperature):
    spans, weights = spans_of(), (1.0, 0.4)
    teachers = [make_model64(5), make_model64(6, width=40)]  # unequal hidden sizes
    columns, held = taught(spans, teachers, weights, temperature)
    terms = objective(direction=direction, beta=beta)
    loss, ours = gradient(
        model64, spans, columns, terms, temperature=temperature, teacher_cache=held
    )
    model64.net.zero_grad(set_to_none=True)
    expected = exact(model64, spans, teachers, weights, temperature, direction, beta)
    expected.backward()
    theirs = torch.cat([p.grad.flatten() for p in model64.net.parameters()])
    assert loss == pytest.approx(expected.item(), abs=1e-12)
    assert theirs.norm() > 1e-3 and (ours - theirs).abs().max() < 1e-12


def test_chunks_and_micro_batches_never_change_it(model64, monkeypatch):
    spans = spans_of()
    columns, held = taught(spans, [make_model64(5), make_model64(6, width=40)])
    loss, expected = gradient(model64, spans, columns, objective(), teacher_cache=held)
    for micro, rows in itertools.product((1, 4), (1, 3)):
        monkeypatch.setattr(update, "rows_in", lambda *_, rows=rows: rows)
        other_loss, other = gradient(
            model64, spans, columns, objective(), teacher_cache=held, micro_batch=micro
        )
        assert abs(other_loss - loss) < 1e-12 and (other - expected).abs().max() < 1e-12


def test_rebuilt_logits_are_the_logits(model):
    """D2 of DeepSeek-V4's engineering: within 1e-5 in fp32."""
    teacher = make_model(9)
    spans = spans_of()
    columns, held = taught(spans, [teacher])
    rebuilt = held.logits(columns["teacher_index"][:, 0], columns["teacher_row"][:, 0])
    at = 0
    for ids, start in spans:
        with torch.no_grad():
            direct = teacher.net(torch.tensor([ids])).logits[0, start - 1 : -1]
        assert (rebuilt[at : at + len(direct)] - direct).abs().max() < 1e-5
        at += len(direct)


def test_padded_vocabularies_of_unequal_size():
    """A teacher whose embedding has extra rows teaches the same as one without."""
    student, plain, padded = make_model(0), make_model(5), make_model(5, extra_rows=21)
    with torch.no_grad():
        for (_, a), (_, b) in zip(
            plain.net.named_parameters(), padded.net.named_parameters(), strict=True
        ):
            b.zero_()[: len(a)] = a
            b[len(a) :] = 30.0
    spans = spans_of()
    results = []
    for teacher in (plain, padded):
        columns, held = taught(spans, [teacher])
        results.append(gradient(student, spans, columns, objective(), teacher_cache=held))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_never_negative_and_zero_at_the_teacher(model):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 200, generator=generator) * 8
    near = logits + 1e-4 * torch.randn(500, 200, generator=generator)
    a, b = logits.log_softmax(-1), near.log_softmax(-1)
    assert kl(a, a).abs().max() == 0
    terms_of_sum = a.exp() * (a - b) - a.exp() + b.exp()
    assert terms_of_sum.min() > -1e-7 and kl(a, b).min() >= -1e-6
    golden = kl(torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log())
    assert float(golden) == pytest.approx(0.6 * math.log(3.0) - 0.1 * math.log(5.0), abs=1e-6)
    spans = spans_of()
    columns, held = taught(spans, [model])
    loss, zero = gradient(model, spans, columns, objective(), teacher_cache=held)
    assert abs(loss) < 1e-6 and zero.abs().max() < 1e-5
