"""The table of per-token quantities: each row by its definition, and what loops over the table."""

import pytest
import torch
from test_scored import Local
from test_update import spans_of

from conftest import make_model64
from opdctl.config.registry import member
from opdctl.errors import StageFailed
from opdctl.scoring.ask_teachers import (
    TeacherRequests,
    require_same_targets,
    score_by_teachers,
)
from opdctl.scoring.asks import Asks, Pass
from opdctl.scoring.columns import column_of
from opdctl.scoring.quantities import QUANTITIES
from opdctl.scoring.score import score
from opdctl.types import ScoreRequest

LIKE = torch.zeros(0, dtype=torch.float64)
DEFINED = {
    "logprobs": lambda logp_NV, p_N: p_N.log(),
    "lse": None,  # of the logits, not of the distribution
    "top1": lambda logp_NV, p_N: logp_NV.max(-1).values,
    "top1_id": lambda logp_NV, p_N: logp_NV.argmax(-1),
    "mass_above": lambda logp_NV, p_N: (logp_NV.exp() * (logp_NV.exp() > p_N[:, None])).sum(-1),
    "entropy": lambda logp_NV, p_N: -(logp_NV.exp() * logp_NV).sum(-1),
    "topk_list_entropy": lambda logp_NV, p_N: bucketed(logp_NV.topk(4, dim=-1).values),
}


def bucketed(logq_NK):
    rest_N = 1 - logq_NK.exp().sum(-1)
    return -(logq_NK.exp() * logq_NK).sum(-1) - rest_N * rest_N.log()


def distribution(model, spans):
    """log-softmax of transformers' own forward at the targets, [N, V], and their probabilities."""
    rows, targets = [], []
    with torch.no_grad():
        for ids, start in spans:
            logits = model.net(torch.tensor([ids])).logits[0, start - 1 : -1]
            rows.append(logits.log_softmax(-1))
            targets += ids[start:]
    logp_NV = torch.cat(rows)
    return logp_NV, logp_NV.gather(-1, torch.tensor(targets)[:, None])[:, 0].exp()


@pytest.mark.parametrize("chunk_mib", [0, 1])
def test_every_row_by_its_definition_alone_and_beside_all_others(model64, chunk_mib):
    """One of them destroys the logits; none reads what it left."""
    spans, run = spans_of(), Pass(chunk_mib=chunk_mib, micro_batch=2)
    logp_NV, p_N = distribution(model64, spans)
    together = score(model64, spans, Asks.of(*QUANTITIES, top=4), run).per_token
    assert together.keys() == QUANTITIES.keys() == DEFINED.keys()
    for need, definition in DEFINED.items():
        alone = score(model64, spans, Asks.of(need, top=4), run).per_token
        assert alone.keys() == {need} and torch.equal(alone[need], together[need])
        if definition is not None:
            assert torch.allclose(
                alone[need].double(), definition(logp_NV, p_N).double(), atol=1e-12
            )
    assert sum(row.overwrites for row in QUANTITIES.values()) <= 1


def test_a_list_tells_the_same(model64):
    """What a server's list gives is what the logits give."""
    scores = score(model64, spans_of(), Asks.of(*QUANTITIES, "topk_logprobs", top=4))
    for row in QUANTITIES.values():
        if row.of_list and row.of:
            value_N = row.of_list(scores.top_NK, scores.top_logprob_NK)
            assert torch.allclose(value_N, scores.per_token[row.need], atol=1e-12), row.need


def test_what_teachers_provide_is_the_table():
    local = set(member("teachers", "local").provides)
    assert local == {f"teacher.{n}" for n in (*QUANTITIES, "hidden", "topk", "topk_list")}
    listed = {n for n, row in QUANTITIES.items() if row.of_list}
    served = set(member("teachers", "server").provides)
    assert served == {f"teacher.{n}" for n in ("logprobs", "topk_list", *listed)}


def asked_of(spans, names):
    """Both teachers score all spans; the second is shown two more ids before each."""
    label = [f"rollout {i}" for i in range(len(spans))]
    requests = [ScoreRequest(tuple(ids), start) for ids, start in spans]
    more = [ScoreRequest((3, 4, *q.ids), q.start + 2) for q in requests]
    both = {"a": requests, "b": more}
    rollouts = list(range(len(spans)))
    return requests, {
        name: TeacherRequests(rollouts, both[name], [place] * len(spans), label)
        for place, name in enumerate(names)
    }


def test_a_teacher_may_be_shown_other_ids_than_the_student(model64):
    spans = spans_of()
    models = {"a": make_model64(5), "b": make_model64(6, width=40)}
    teachers = {n: (Local(m), w) for (n, m), w in zip(models.items(), (0.7, 0.4), strict=True)}
    requests, by_teacher = asked_of(spans, "ab")
    require_same_targets(by_teacher, requests)
    asks = Asks.of("logprobs", "entropy", "hidden")
    answer = score_by_teachers(by_teacher, teachers, asks, Pass(), None, like=LIKE)
    expected = 0.0
    for name, shown in (("a", spans), ("b", [((3, 4, *ids), s + 2) for ids, s in spans])):
        weight = teachers[name][1]
        logp_NV, p_N = distribution(models[name], shown)
        expected = expected + weight * torch.stack([p_N.log(), DEFINED["entropy"](logp_NV, p_N)])
    for value_N, need in zip(expected / 1.1, ("logprobs", "entropy"), strict=True):
        assert torch.allclose(answer.columns[column_of("teacher", need)], value_N, atol=1e-12)
    read = sum(len(q.ids) for mine in by_teacher.values() for q in mine.requests)
    assert answer.tokens == read and len(answer.cache.held) == 2
    assert answer.cache.held[1].hidden_ND.shape == (sum(map(len, requests)), 40)


def test_a_teacher_asked_for_other_targets_is_refused(model64):
    requests, by_teacher = asked_of(spans_of(), "ab")
    third = by_teacher["b"].requests[2]
    by_teacher["b"].requests[2] = ScoreRequest((*third.ids[:-1], 5), third.start)
    with pytest.raises(StageFailed, match=r"teacher b is asked for other tokens.*rollout 2"):
        require_same_targets(by_teacher, requests)


def test_what_has_no_mean_is_refused_of_pooled_teachers(model64):
    teachers = {n: (Local(make_model64(i)), 1.0) for i, n in enumerate("ab", 5)}
    _, by_teacher = asked_of(spans_of(), "ab")
    with pytest.raises(StageFailed, match=r"teacher\.top1 has no mean over several teachers"):
        score_by_teachers(by_teacher, teachers, Asks.of("top1"), Pass(), None, like=LIKE)
    _, one = asked_of(spans_of(), "a")
    answer = score_by_teachers(one, teachers, Asks.of("top1", "lse"), Pass(), None, like=LIKE)
    assert answer.columns.keys() == {"teacher_top1", "teacher_weight"}  # lse stays with its teacher
