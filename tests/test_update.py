"""The invariants of the update, in float64: nothing that should not matter matters."""

import copy
import itertools

import pytest
import torch

from opdctl.loss.objectives.nll import Nll
from opdctl.loss.objectives.policy_gradient import PolicyGradient
from opdctl.loss.weights.is_gate import IsGate
from opdctl.loss.weights.pop import Pop
from opdctl.models.packing import (
    last_per_sequence,
    micro_batches,
    minibatch_slices,
    pack,
    per_sequence,
)
from opdctl.scoring.asks import Pass
from opdctl.scoring.score import score
from opdctl.train import update
from opdctl.types import ScoreRequest


class Span(ScoreRequest):
    """A request that unpacks into its ids and its start."""

    def __iter__(self):
        return iter((list(self.ids), self.start))


def spans_of(seed=0, count=9, vocab=30):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(3, vocab, (n,), generator=generator).tolist()

    sizes = [(3, 1), (5, 4), (2, 7), (9, 1), (4, 2), (1, 12), (6, 3), (2, 2), (3, 5)][:count]
    return [Span(tuple(draw(a + b)), a) for a, b in sizes]


def logprobs(model, requests, **options):
    return score(model, requests, run=Pass(**options)).logprobs_N


def tokens_in(spans):
    return sum(len(ids) - start for ids, start in spans)


def gradient(model, spans, columns, terms, teacher_cache=None, **options):
    model.net.zero_grad(set_to_none=True)
    run = Pass(**{"chunk_mib": 256, **options})
    batch = update.Batch(spans, columns, terms, teacher_cache)
    loss = update.accumulate(model, batch, run).loss
    return loss, torch.cat([p.grad.flatten() for p in model.net.parameters()])


def pg_terms(**keys):
    return [
        update.LossTerm(
            PolicyGradient(PolicyGradient.Config(**keys)), gates=[IsGate(IsGate.Config())]
        )
    ]


def pg_columns(model, spans, seed=0):
    requests = [ScoreRequest(tuple(ids), start) for ids, start in spans]
    policy = logprobs(model, requests, temperature=1.0)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(policy), generator=generator, dtype=policy.dtype)
    return {
        "advantage": torch.randn(len(policy), generator=generator, dtype=policy.dtype),
        "behaviour": policy + 0.3 * noise,
        "policy": policy + 0.1 * noise.flip(0),
    }


@pytest.mark.parametrize("normalise", ["seq_mean", "token_mean"])
def test_micro_batch_and_chunk_never_change_the_gradient(model64, normalise):
    spans = spans_of()
    columns = pg_columns(model64, spans)
    terms = pg_terms(clip_low=0.2, clip_high=0.28)
    terms[0].normalise = normalise
    loss, expected = gradient(model64, spans, columns, terms)
    for micro, rows in itertools.product((1, 2, 4), (1, 3, 1000)):
        update.rows_in = lambda *_, rows=rows: rows
        try:
            other_loss, other = gradient(model64, spans, columns, terms, micro_batch=micro)
        finally:
            from opdctl.kernels.chunks import rows_in

            update.rows_in = rows_in
        assert abs(other_loss - loss) < 1e-12
        assert (other - expected).abs().max() < 1e-12


def test_order_of_sequences_never_changes_the_gradient(model64):
    spans = spans_of()
    columns = pg_columns(model64, spans)
    loss, expected = gradient(model64, spans, columns, pg_terms())
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    lengths = [len(ids) - start for ids, start in spans]
    cut = {k: v.split(lengths) for k, v in columns.items()}
    moved = {k: torch.cat([v[i] for i in order]) for k, v in cut.items()}
    other_loss, other = gradient(model64, [spans[i] for i in order], moved, pg_terms())
    assert abs(other_loss - loss) < 1e-12 and (other - expected).abs().max() < 1e-12


def test_padding_never_changes_the_gradient(model64):
    spans = spans_of(count=4)
    columns = pg_columns(model64, spans)
    _, expected = gradient(model64, spans, columns, pg_terms())
    before = model64.pad
    model64.pad = 7
    _, other = gradient(model64, spans, columns, pg_terms())
    model64.pad = before
    assert (other - expected).abs().max() < 1e-12


@pytest.mark.parametrize("normalise", ["seq_mean", "token_mean"])
def test_nll_equals_plain_autograd(model64, normalise):
    spans = spans_of()
    terms = [update.LossTerm(Nll(Nll.Config()), normalise=normalise)]
    _, ours = gradient(model64, spans, {}, terms)
    model64.net.zero_grad(set_to_none=True)
    total = 0.0
    for ids, start in spans:
        logits = model64.net(torch.tensor([ids])).logits[0].double()
        nll = torch.nn.functional.cross_entropy(
            logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="sum"
        )
        if normalise == "seq_mean":
            total = total + nll / (len(ids) - start) / len(spans)
        else:
            total = total + nll / tokens_in(spans)
    total.backward()
    theirs = torch.cat([p.grad.flatten() for p in model64.net.parameters()])
    assert (ours - theirs).abs().max() < 1e-12


def test_ppo_clip_equals_plain_autograd(model64):
    spans = spans_of()
    columns = pg_columns(model64, spans)
    term = update.LossTerm(PolicyGradient(PolicyGradient.Config(clip_low=0.05, clip_high=0.1)))
    _, ours = gradient(model64, spans, columns, [term])
    model64.net.zero_grad(set_to_none=True)
    total, at = 0.0, 0
    for ids, start in spans:
        logp = model64.net(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        n = len(ids) - start
        logp = logp[start - 1 : -1].gather(-1, torch.tensor(ids[start:])[:, None])[:, 0]
        ratio = (logp - columns["policy"][at : at + n]).exp()
        a = columns["advantage"][at : at + n]
        surrogate = torch.minimum(ratio * a, ratio.clamp(0.95, 1.1) * a)
        total = total - surrogate.mean() / len(spans)
        at += n
    total.backward()
    theirs = torch.cat([p.grad.flatten() for p in model64.net.parameters()])
    assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("baseline", [0.0, 1.7])
def test_expected_policy_gradient_is_the_reverse_kl_gradient(model64, baseline):
    """At a fixed prefix, summed over every next token with its probability (MiMo Eq. 5 and 6)."""
    from conftest import make_model64

    teacher = make_model64(5)
    prefix = [4, 9, 12, 7]

    def next_logprobs(model):
        return model.net(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)

    with torch.no_grad():
        log_s, log_t = next_logprobs(model64), next_logprobs(teacher)
    model64.net.zero_grad(set_to_none=True)
    expected = torch.zeros(sum(p.numel() for p in model64.net.parameters()))
    for v in range(model64.valid_V):
        columns = {"advantage": (log_t - log_s)[v : v + 1] - baseline}
        term = update.LossTerm(PolicyGradient(PolicyGradient.Config()))
        _, one = gradient(model64, [Span((*prefix, v), len(prefix))], columns, [term])
        expected += log_s[v].exp() * one
    model64.net.zero_grad(set_to_none=True)
    live = next_logprobs(model64)
    (live.exp() * (live - log_t)).sum().backward()
    exact = torch.cat([p.grad.flatten() for p in model64.net.parameters()])
    assert exact.norm() > 1e-3
    assert (expected - exact).abs().max() < 1e-12


def test_teacher_equal_to_student_gives_exactly_zero(model):
    spans = [*spans_of(), Span((5, 6), 1)]  # one-token responses included
    requests = [ScoreRequest(tuple(ids), start) for ids, start in spans]
    ours = logprobs(model, requests, temperature=1.0)
    teacher = copy.deepcopy(model)
    assert torch.equal(ours, logprobs(teacher, requests, temperature=1.0))
    apart = torch.cat([logprobs(model, [r], temperature=1.0) for r in requests])
    assert (ours - apart).abs().max() < 1e-5
    rolled = ours.roll(1)
    assert (rolled - ours).abs().mean() > 0.1  # a shift by one token is loud


def test_gates_zero_outside_and_keep_the_count(model64):
    spans = spans_of()
    columns = pg_columns(model64, spans)
    columns["behaviour"] = columns["policy"].clone()
    columns["behaviour"][3] -= 5.0  # ratio far above 2
    gate = IsGate(IsGate.Config(low=0.5, high=2.0))
    term = update.LossTerm(PolicyGradient(PolicyGradient.Config()), gates=[gate])
    requests = [ScoreRequest(tuple(ids), start) for ids, start in spans]
    live = logprobs(model64, requests, temperature=1.0)
    ratio = (live - columns["behaviour"]).exp()
    inside = (ratio >= 0.5) & (ratio <= 2.0)
    assert not inside[3] and inside.sum() > 20
    batch = update.Batch(spans, columns, [term])
    table = update.accumulate(model64, batch, Pass(chunk_mib=256)).table
    assert torch.equal(table["gate_open"].bool(), inside)
    assert torch.allclose(table["ratio"], ratio, atol=1e-12)
    _, gated = gradient(model64, spans, columns, [term])
    weighted = {"advantage": columns["advantage"] * ratio * inside}  # the same by hand
    _, expected = gradient(model64, spans, weighted, [update.LossTerm(term.objective)])
    assert (gated - expected).abs().max() < 1e-12  # the gate does not change the count
    pop = update.LossTerm(
        PolicyGradient(PolicyGradient.Config()), gates=[Pop(Pop.Config(beta=2.0))]
    )
    columns["behaviour"] = columns["policy"] + 1.0  # rho = 1/e, below 1/2 everywhere
    loss, zero = gradient(model64, spans, columns, [pop])
    assert loss == 0 and zero.abs().max() == 0


def test_all_masked_runs_backward_and_contributes_zero(model64):
    class Nothing:
        def mask(self, columns):
            return torch.zeros(tokens_in(spans))

    spans = spans_of(count=3)
    term = update.LossTerm(Nll(Nll.Config()), masks=[Nothing()])
    loss, zero = gradient(model64, spans, {}, [term])
    assert loss == 0 and zero.abs().max() == 0


def test_packing_round_trip():
    spans = spans_of()
    packed = pack(spans, 0)
    flat = packed.ids_BT.flatten()
    assert torch.equal(flat[packed.token_N], packed.target_N)
    assert torch.equal(packed.prediction_N, packed.token_N - 1)
    ones = torch.ones(len(packed.target_N))
    assert per_sequence(ones, packed.sequence_N, len(spans)).tolist() == packed.length_B.tolist()
    last = last_per_sequence(packed.target_N.float(), packed.length_B)
    assert last.tolist() == [float(ids[-1]) for ids, _ in spans]
    for size in (0, 1, 4):
        groups = micro_batches(spans, size)
        assert sorted(i for g, _ in groups for i in g) == list(range(len(spans)))
        covered = torch.cat([t for _, t in groups])
        assert sorted(covered.tolist()) == list(range(tokens_in(spans)))
    assert minibatch_slices([1, 2, 3, 4, 5], 2) == [
        (slice(0, 2), slice(0, 3)),
        (slice(2, 5), slice(3, 15)),
    ]
    assert len(minibatch_slices([1] * 6, 5)) == 5 and len(minibatch_slices([1, 1], 5)) == 2


def test_learning_rate_is_a_pure_function():
    from opdctl.config.settings import Optim

    optim = Optim(lr=1.0, schedule="cosine", warmup=10, final=0.1)
    values = [update.lr_at(s, 100, optim) for s in range(100)]
    assert values[0] == 0.1 and values[9] == 1.0 and values[10] == 1.0
    assert values[-1] == 0.1 and values == sorted(values[:10]) + sorted(values[10:], reverse=True)
    assert update.lr_at(55, 100, Optim(lr=2.0)) == 2.0
    linear = Optim(lr=1.0, schedule="linear", final=0.0)
    assert update.lr_at(50, 101, linear) == 0.5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("final", [0.0, 0.05, 0.1, 1 / 3, 1.0])
def test_the_last_step_has_the_share_that_final_says(schedule, final):
    """Ten steps used to end at .19 of the rate (linear): the share was that of an eleventh."""
    optim = update.Optim(lr=3e-4, schedule=schedule, final=final)
    for warmup, steps in ((0, 10), (3, 10), (8, 10), (0, 2)):
        optim.warmup = warmup
        rates = [update.lr_at(s, steps, optim) for s in range(steps)]
        assert rates[-1] == 3e-4 * final and rates[warmup] == pytest.approx(3e-4)
        fall = rates[warmup:]
        assert fall == sorted(fall, reverse=True)
    for warmup, steps in ((0, 1), (9, 10)):  # the step after the warm-up is the last one
        optim.warmup = warmup
        assert update.lr_at(steps - 1, steps, optim) == 3e-4 * final
    optim.warmup = 10  # the warm-up is longer than the stage: it rises to the end
    assert update.lr_at(9, 10, optim) == 3e-4
