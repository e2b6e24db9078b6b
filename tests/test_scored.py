"""From rollouts through the teachers to the gradient: the columns that ``scored`` itself makes."""

from types import SimpleNamespace

import pytest
import torch
from test_divergence import exact, objective
from test_update import spans_of

from conftest import make_model64
from opdctl.config.registry import member
from opdctl.config.settings import Runtime
from opdctl.kernels.reference import divergence
from opdctl.models.packing import minibatch_slices
from opdctl.scoring.asks import Asks, Pass
from opdctl.scoring.score import score
from opdctl.train import update
from opdctl.train.score_step import score_step
from opdctl.train.step import TrainSetup
from opdctl.types import Compute, Prompt, Rollout

WEIGHTS, TEMPERATURE = (0.7, 0.4), 0.7


class Local:
    """A teacher as scoring/teachers/local.py, its weights in hand."""

    stored = None
    provides = member("teachers", "local").provides

    def __init__(self, model):
        self.model, self.parameters = model, model.parameters

    def score(self, requests, asks, run):
        return score(self.model, requests, asks, run)

    def head(self, temperature, rounded):
        return self.model.lm_head(temperature, rounded)


def step_of(student, teachers, route, **keys):
    """Rollouts of two domains in turn, scored."""
    spans = spans_of()
    rollouts = [
        Rollout(Prompt(str(i), f"d{i % 2}", "q", "a", {}), ids[:start], ids[start:], group=i)
        for i, (ids, start) in enumerate(spans)
    ]
    named = {f"t{i}": (Local(m), w) for i, (m, w) in enumerate(zip(teachers, WEIGHTS, strict=True))}
    given = TrainSetup(None, [], teachers=named, route=route, temperature=TEMPERATURE, **keys)
    ctx = SimpleNamespace(runtime=Runtime(dtype="float64"), check=lambda: None, wal=None)
    return spans, score_step(rollouts, student, given, ctx, Compute())


def trained(student, spans, step, minibatches=1):
    """Gradients of each minibatch, as the loop takes them."""
    lengths, found = [len(ids) - start for ids, start in spans], []
    for sequences, part in minibatch_slices(lengths, minibatches):
        student.net.zero_grad(set_to_none=True)
        columns = {k: v[part] for k, v in step.columns.items()}
        batch = update.Batch(spans[sequences], columns, objective(), step.teacher_cache)
        update.accumulate(student, batch, Pass(temperature=TEMPERATURE, micro_batch=2, chunk_mib=1))
        grads = [p.grad.flatten() for p in student.net.parameters()]
        found.append((sequences, torch.cat(grads)))
    return found


@pytest.mark.parametrize("minibatches", [1, 2])
def test_routed_teachers_reach_the_gradient(model64, minibatches):
    """Unequal widths, unequal weights, a temperature: each token by its own teacher's row."""
    teachers = [make_model64(5), make_model64(6, width=40)]
    wants = {"teacher_asks": Asks.of("hidden", "logprobs")}
    spans, step = step_of(model64, teachers, {"d0": ["t0"], "d1": ["t1"]}, **wants)
    for sequences, ours in trained(model64, spans, step, minibatches):
        model64.net.zero_grad(set_to_none=True)
        first = sequences.start % 2
        turned = teachers[first:] + teachers[:first], WEIGHTS[first:] + WEIGHTS[:first]
        exact(model64, spans[sequences], *turned, TEMPERATURE, "reverse", 0.5).backward()
        theirs = torch.cat([p.grad.flatten() for p in model64.net.parameters()])
        assert theirs.norm() > 1e-3 and (ours - theirs).abs().max() < 1e-12


def test_columns_by_definition(model64):
    """Routed and pooled: the teacher's log-prob, the policy's KL, weights and domains."""
    teachers = [make_model64(5), make_model64(6, width=40)]
    both = Asks.of("hidden", "logprobs")
    wants = {"teacher_asks": both, "policy_asks": both, "policy_kl_top": 0}
    routed = {"d0": ["t0"], "d1": ["t1"]}
    pooled = {"d0": ["t0", "t1"], "d1": ["t1"]}
    for route in (routed, pooled):
        spans, step = step_of(model64, teachers, route, **wants)
        at = 0
        for i, (ids, start) in enumerate(spans):
            rows, target = slice(start - 1, len(ids) - 1), torch.tensor(ids[start:])[:, None]
            with torch.no_grad():
                log_p, *log_q = (
                    (m.net(torch.tensor([ids])).logits[0, rows] / TEMPERATURE).log_softmax(-1)
                    for m in (model64, *teachers)
                )
            mine = [int(name[1:]) for name in route[f"d{i % 2}"]]
            total = sum(WEIGHTS[t] for t in mine)
            here = slice(at, at + len(target))
            logq = sum(WEIGHTS[t] * log_q[t].gather(-1, target)[:, 0] for t in mine) / total
            kl = sum(WEIGHTS[t] * divergence(log_p, log_q[t], "reverse") for t in mine) / total
            expected = {
                "teacher": logq,
                "policy": log_p.gather(-1, target)[:, 0],
                "policy_kl": kl,
                "teacher_weight": torch.full((len(target),), total),
                "domain": torch.full((len(target),), i % 2),
            }
            for name, value in expected.items():
                assert torch.allclose(step.columns[name][here], value, atol=1e-12), name
            at += len(target)
