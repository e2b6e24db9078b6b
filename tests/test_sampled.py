"""The sampled-token path against exact expectations over the vocabulary, in float64."""

import pytest
import torch
from test_chunks import LEVELS, columns_of
from test_topk import N, V, pair, probabilities

from opdctl.kernels import chunked
from opdctl.loss.objectives.divergence import Divergence
from opdctl.loss.objectives.policy_gradient import PolicyGradient
from opdctl.loss.objectives.sampled_kl import GRADIENT, SampledKl
from opdctl.loss.signals.kl_baseline import KlBaseline
from opdctl.loss.signals.reverse_kl import ReverseKl
from opdctl.loss.token_view import LossTerm, weighted_sum
from opdctl.loss.weights.icepop import Icepop
from opdctl.loss.weights.truncated import Truncated
from opdctl.scoring.teacher_cache import reverse_kl
from running import inside

INDEX = torch.tensor([0] * 5 + [1] * (N - 5))


def expectation(objective, columns_for):
    """Gradients of the hidden rows, exactly averaged over the token sampled from p.

    Returns the mean gradient and the mean of its square, [N, D] and [N].
    """
    hidden, head, taught = pair()
    p, q = (x.detach() for x in probabilities(hidden, head, taught))
    mean, square = torch.zeros_like(hidden), torch.zeros(N, dtype=torch.float64)
    for v in range(V):
        columns = columns_of(INDEX) | columns_for(p, q, v)
        total, _ = weighted_sum(
            hidden,
            head,
            torch.full((N,), v),
            columns,
            [(LossTerm(objective), torch.ones(N, dtype=torch.float64))],
            rows_of=chunked.Rows,
            size=4,
            teacher_cache=taught,
        )
        (grad,) = torch.autograd.grad(total, hidden)
        mean += p[:, v, None].exp() * grad
        square += p[:, v].exp() * grad.square().sum(-1)
    return mean.detach(), square


def exact(direction):
    objective = Divergence(Divergence.Config(direction=direction))
    return expectation(objective, lambda p, q, v: {})[0]


def kl_of(p, q):
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("baseline", ["none", "kl", "constant"])
def test_the_policy_gradient_is_unbiased_with_any_baseline(baseline):
    bases = {"none": lambda p, q: 0.0, "kl": kl_of, "constant": lambda p, q: 3.0}

    def columns(p, q, v):
        return {"advantage": q[:, v] - p[:, v] + bases[baseline](p, q)}

    mean, _ = expectation(PolicyGradient(PolicyGradient.Config()), columns)
    assert mean.norm() > 0.1 and (mean - exact("reverse")).abs().max() < 1e-12


def test_the_closed_form_baseline_makes_variance_smaller():
    objective, found = PolicyGradient(PolicyGradient.Config()), []
    for use in (0.0, 1.0):
        mean, square = expectation(
            objective,
            lambda p, q, v, use=use: {"advantage": q[:, v] - p[:, v] + use * kl_of(p, q)},
        )
        found.append(float((square - mean.square().sum(-1)).sum()))
    assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("top", [0, 3])
def test_the_baseline_is_the_kl_of_each_token(level, top):
    hidden, head, taught = pair()
    p, q = (x.detach() for x in probabilities(hidden, head, taught))
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    columns = columns_of(INDEX)
    asked = {
        "teacher_index": columns["teacher_index"][shuffled, None],
        "teacher_row": columns["teacher_row"][shuffled, None],
        "pair_weight": torch.ones(N, 1, dtype=torch.float64),
    }
    found = reverse_kl(
        hidden[shuffled], head, taught, asked, rows_of=LEVELS[level], size=2, top=top
    )
    if top:
        ids = p.topk(top).indices
        p, q = (x.gather(-1, ids).log_softmax(-1) for x in (p, q))
    assert torch.allclose(found, kl_of(p, q)[shuffled], atol=1e-12) and (found >= 0).all()
    step = type("Step", (), {})()
    step.columns = {"policy_kl": found, "teacher_weight": torch.full((N,), 2)}
    credit = KlBaseline(KlBaseline.Config(), None).credit(step)
    assert torch.equal(credit, 2 * found)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_what_differentiating_an_estimator_gives(estimator):
    """k1 nothing, k2 the reverse, k3 the forward gradient: what the names are refused for."""
    objective = SampledKl(SampledKl.Config())
    if estimator == "k1":
        objective = type(
            "K1", (), {"needs": (), "loss": lambda self, view: view.logprob_C - view["teacher"]}
        )()
    else:
        objective.config.estimator = estimator
    mean, _ = expectation(objective, lambda p, q, v: {"teacher": q[:, v]})
    if estimator == "k1":
        assert mean.abs().max() < 1e-12
    else:
        assert (mean - exact(GRADIENT[estimator])).abs().max() < 1e-12
        other = {"reverse": "forward", "forward": "reverse"}[GRADIENT[estimator]]
        assert (mean - exact(other)).abs().max() > 1e-2


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_what_an_estimator_gives_as_a_credit(estimator):
    """Only k1 gives the reverse-KL gradient."""

    def columns(p, q, v):
        u = q[:, v] - p[:, v]
        return {"advantage": {"k1": u, "k2": -0.5 * u**2, "k3": -(u.exp() - 1 - u)}[estimator]}

    mean, _ = expectation(PolicyGradient(PolicyGradient.Config()), columns)
    gap = float((mean - exact("reverse")).abs().max())
    assert gap < 1e-12 if estimator == "k1" else gap > 1e-2
    config = ReverseKl.Config(estimator=estimator)
    assert bool(ReverseKl.problems(config, None)) == (estimator != "k1")


STAGE = ("stage", "opd", "--student", "a/s", "--teacher", "a/t", "signals={}", "--dry-run")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("{estimator: k1}", "no gradient on average"),
        ("{estimator: k3}", "the gradient of the forward KL"),
        ("{estimator: k2, direction: forward}", "the gradient of the reverse KL"),
    ],
)
def test_a_wrong_estimator_is_refused_by_name(keys, says):
    done = inside(*STAGE, f"objectives={{sampled_kl: {keys}}}")
    assert done.returncode == 2 and says in done.stderr and "estimator=k" in done.stderr


PG = "objectives={policy_gradient: {weights: %s}}"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ((PG % "{icepop: {low: 3, high: 2}}",), "3.0 is above high, 2.0"),
        ((PG % "{is_gate: {low: 3}}",), "3.0 is above high, 2.0"),
        ((PG % "{is_gate: {}, truncated: {}}",), "is_gate and truncated: each applies the ratio"),
        (("signals={kl_baseline: {}}",), "no gradient on average"),
        (
            ("objectives={topk_tail: {}}", "signals={}", "minibatches=2"),
            "no longer the policy's own",
        ),
    ],
)
def test_what_would_be_wrong_is_refused(keys, says):
    done = inside("stage", "opd", "--student", "a/s", "--teacher", "a/t", "--dry-run", *keys)
    assert done.returncode == 2 and says in done.stderr, done.stderr


class Seen:
    """A view of three tokens whose ratios of trainer to sampler are .4, 1.5 and 6."""

    def __init__(self):
        self.old_C = torch.tensor([0.4, 1.5, 6.0]).log()
        self.logged = {}

    def __getitem__(self, name):
        return torch.zeros(3)

    def log(self, name, value_C):
        self.logged[name] = value_C


def test_gates_by_hand():
    view = Seen()
    assert Icepop(Icepop.Config()).gate(view).tolist() == pytest.approx([0, 1.5, 0])
    assert view.logged["gate_open"].tolist() == [0, 1, 0]
    assert Truncated(Truncated.Config(cap=2)).gate(view).tolist() == pytest.approx([0.4, 1.5, 2])
    assert view.logged["gate_open"].tolist() == [1, 1, 0]


def test_the_advantage_is_clipped():
    hidden, head, _ = pair()
    advantages, grads = torch.linspace(-4, 4, N), []
    for bound, advantage in ((1.5, advantages), (0, advantages.clamp(-1.5, 1.5))):
        objective = PolicyGradient(PolicyGradient.Config(advantage_clip=bound))
        total, table = weighted_sum(
            hidden,
            head,
            torch.arange(N),
            columns_of(INDEX) | {"advantage": advantage.double()},
            [(LossTerm(objective), torch.ones(N, dtype=torch.float64))],
            rows_of=chunked.Rows,
            size=4,
        )
        grads.append(torch.autograd.grad(total, hidden)[0])
        if bound:
            assert table["advantage_clipped"].tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert torch.equal(*grads)
