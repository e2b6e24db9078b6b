"""Signals, the outcome model's objective, and sources, on hand-made steps."""

import pytest
import torch

from opdctl.loss.objectives.outcome import Outcome as OutcomeLoss
from opdctl.loss.signals.kl_baseline import KlBaseline
from opdctl.loss.signals.outcome import Outcome
from opdctl.loss.signals.reverse_kl import ReverseKl
from opdctl.scoring.asks import Pass
from opdctl.train.score_step import set_advantage
from opdctl.train.step import Step
from opdctl.types import Prompt, Rollout, ScoreRequest

PROMPT = Prompt("0", "d", "q", "a", {})


def step_of(rewards, groups, lengths, **columns):
    rollouts = [
        Rollout(PROMPT, [1], [2] * n, reward=r, group=g)
        for r, g, n in zip(rewards, groups, lengths, strict=True)
    ]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Step(rollouts, columns, sequence)


def outcome(**keys):
    return Outcome(Outcome.Config(**keys), None)


def test_group_advantage_by_hand():
    step = step_of([1.0, 0.0, 1.0, 1.0, 0.5, 0.5], [0, 0, 0, 0, 1, 1], [2, 1, 1, 1, 3, 1])
    std = (0.75 * 0.25) ** 0.5
    expected = [0.25 / std] * 2 + [-0.75 / std] + [0.25 / std] * 2 + [0.0] * 4
    assert outcome().credit(step).tolist() == pytest.approx(expected)
    plain = outcome(scale_std=False).credit(step).tolist()
    assert plain == pytest.approx([0.25, 0.25, -0.75, 0.25, 0.25, 0, 0, 0, 0])
    raw = outcome(baseline="none", scale_std=False).credit(step).tolist()
    assert raw == [1.0, 1.0, 0.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]


def test_reverse_kl_by_hand():
    columns = {
        "teacher": torch.tensor([-1.0, -9.0, -0.5]),
        "policy": torch.tensor([-2.0, -1.0, -0.5]),
        "teacher_weight": torch.tensor([1.0, 1.0, 2.0]),
    }
    step = step_of([None] * 2, [0, 0], [2, 1], **columns)
    assert ReverseKl(ReverseKl.Config(), None).credit(step).tolist() == [1.0, -8.0, 0.0]
    assert ReverseKl(ReverseKl.Config(clip=5.0), None).credit(step).tolist() == [1.0, -5.0, 0.0]


SURE = ([0.9, 0.05, 0.05], [0.4, 0.3, 0.3])  # a student surer than its teacher
ALIKE = ([0.4, 0.4, 0.2], [0.6, 0.3, 0.1])


@pytest.mark.parametrize(("sides", "rises"), [(SURE, True), (ALIKE, False), (SURE[::-1], False)])
def test_a_baseline_says_what_it_does_to_the_variance(sides, rises):
    """Tokens as often as the student says them: the metric is its formula in float64, and on the
    side of 1 on which the variance of the whole gradient of the logits is."""
    p, q = (torch.tensor(side, dtype=torch.float64) for side in sides)
    token = torch.arange(3).repeat_interleave((20 * p).round().long())
    kl = (p * (p / q).log()).sum()
    columns = {"teacher": q.log()[token], "policy": p.log()[token]}
    columns |= {"policy_kl": kl.expand(20), "teacher_weight": torch.ones(20, dtype=torch.float64)}
    step = step_of([None], [0], [20], **columns)
    step.sequence_N = torch.zeros(20, dtype=torch.long)
    signals = {
        "reverse_kl": (1.0, ReverseKl(ReverseKl.Config(), None)),
        "kl_baseline": (1.0, KlBaseline(KlBaseline.Config(), None)),
    }
    logged = set_advantage(step, signals)
    plain = (q / p).log()
    own = [(p * ((1 - p) * a).square()).sum() for a in (plain + kl, plain)]
    assert logged["kl_baseline_variance"] == pytest.approx(float(own[0] / own[1]), rel=1e-12)
    score = torch.eye(3) - p  # of the logits, for each token
    mean = (p[:, None] * plain[:, None] * score).sum(0)
    traces = [
        float((p * (a[:, None] * score - mean).square().sum(-1)).sum()) for a in (plain + kl, plain)
    ]
    assert (logged["kl_baseline_variance"] > 1) == (traces[0] > traces[1]) == rises
    assert "reverse_kl_variance" not in logged


def test_outcome_loss_is_cross_entropy_at_every_token():
    class TokenView:
        score_C = torch.tensor([0.3, -2.0, 1.0])

        def __getitem__(self, column):
            return torch.tensor([1.0, 0.0, 0.0])

        def log(self, name, value):
            assert value.tolist() == [1.0, 1.0, 0.0]

    sigmoid = TokenView.score_C.sigmoid()
    expected = -torch.stack([sigmoid[0].log(), (1 - sigmoid[1]).log(), (1 - sigmoid[2]).log()])
    assert torch.allclose(OutcomeLoss(OutcomeLoss.Config()).loss(TokenView()), expected)


def test_outcome_model_reads_the_last_token_and_learns():
    """Trained for a few steps on answers that are right if they end in one letter, it can tell."""
    from torch import nn
    from transformers import Qwen3ForTokenClassification

    from conftest import make_model
    from opdctl.models.model import Model
    from opdctl.rollout.rewards.model import Model as Reward
    from opdctl.train import update

    seed = make_model()
    config = seed.net.config
    config.num_labels = 1
    torch.manual_seed(0)
    net = Qwen3ForTokenClassification(config)
    net.model.load_state_dict(seed.net.model.state_dict())
    nn.init.zeros_(net.score.weight)
    model = Model(net.train(False), seed.tokenizer)
    generator = torch.Generator().manual_seed(1)
    answers = torch.randint(5, 30, (64, 3), generator=generator).tolist()
    spans = [ScoreRequest((1, 9, 2, *a), 3) for a in answers]
    right = torch.tensor([float(a[-1] < 17) for a in answers])
    columns = {"reward": right.repeat_interleave(3)}
    optim = update.Optim(lr=1e-2)
    optimizer = update.make_optimizer(model, optim)
    for _ in range(60):
        term = update.LossTerm(OutcomeLoss(OutcomeLoss.Config()))
        update.accumulate(model, update.Batch(spans, columns, [term]), Pass(chunk_mib=64))
        update.step(model, optimizer, 1e-2, 1.0)
    reward = Reward.__new__(Reward)
    reward.model = model
    reward.ctx = type(
        "C", (), {"runtime": type("R", (), {"micro_batch": 5}), "check": lambda s: None}
    )()
    rollouts = [Rollout(PROMPT, [1, 9, 2], a) for a in answers]
    reward.score(rollouts)
    told = sum((r.reward > 0.5) == bool(y) for r, y in zip(rollouts, right, strict=True))
    assert told >= 60 and all(0 < r.reward < 1 for r in rollouts)


def test_a_request_needs_context():
    with pytest.raises(AssertionError):
        ScoreRequest((1, 2), 0)
