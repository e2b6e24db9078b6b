"""Masks and gates that leave a mini-batch, a step or a stage without a token to learn from."""

import pytest
import torch
from one_step import opd
from test_update import pg_columns, pg_terms, spans_of

from conftest import make_model
from opdctl.config.settings import Optim
from opdctl.errors import Interrupted, StageFailed
from opdctl.loss.weights.outcome_gate import OutcomeGate
from opdctl.models import tensor_file
from opdctl.scoring.asks import Pass
from opdctl.train import update
from opdctl.train.context import Context
from running import carry_out, plain

GATED = {"weights": {"outcome_gate": {}}}
CREDIT = {"signals": {"reverse_kl": {"floor": 0.1}}, "objectives": {"policy_gradient": GATED}}
DIVERGENCE = {"signals": {}, "objectives": {"divergence": GATED}}
# of AdamW: what moves weights on its own
OPTIM = {"lr": 1e-2, "weight_decay": 0.1}


def masked(monkeypatch, keeps):
    """Let ``outcome_gate`` keep a rollout where ``keeps(step's number, its place)``."""

    def mask(self, step):
        kept = [float(keeps(step.done, b)) for b in range(len(step.rollouts))]
        return step.spread(kept)

    monkeypatch.setattr(OutcomeGate, "mask", mask)


def weights(ctx):
    return tensor_file.read(ctx.folder / "output" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


MASKS = {
    "tip": {"keep": 0.05},
    "reopold": {"until": 0.0, "keep": 0.05},
    "special_tokens": {},
    "window": {"last": 1},
    "position": {"shape": "late"},
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("keys", [CREDIT, DIVERGENCE], ids=["credit", "divergence"])
def test_a_mini_batch_without_tokens_is_left_out(on_disk, tmp_path, name, keys):
    """Each mini-batch is one short response: the share of the step's tokens falls on few."""
    (objective,) = keys["objectives"]
    keys = keys | {"objectives": {objective: {"weights": {name: MASKS[name]}}}}
    sampling = {"max_tokens": 1} if name == "special_tokens" else {"max_tokens": 4}
    ctx = opd(on_disk, tmp_path, minibatches=8, sampling=sampling, prompts={"per_step": 8}, **keys)
    rows = carry_out(ctx)
    assert [r["rollouts"] for r in rows] == [8, 8] and all(r["loss"] is not None for r in rows)
    assert not any("skipped" in r for r in rows)  # that is of numbers that are not finite
    if name in ("tip", "reopold"):
        kept = [round(0.05 * r["tokens"]) or 1 for r in rows]
        assert [r["empty_updates"] >= 8 - k for r, k in zip(rows, kept, strict=True)] == [True] * 2
    if name in ("window", "position"):
        assert not any("empty_updates" in r for r in rows)


@pytest.mark.parametrize("keys", [CREDIT, DIVERGENCE], ids=["credit", "divergence"])
def test_half_a_step_masked_is_the_other_half_alone(on_disk, tmp_path, monkeypatch, keys):
    """Of two mini-batches in two epochs the second has no token: as often moved as the first."""
    masked(monkeypatch, lambda done, b: b < 3)
    ctx = opd(on_disk, tmp_path, minibatches=2, epochs=2, optim=OPTIM, **keys)
    rows = carry_out(ctx)
    assert [r["empty_updates"] for r in rows] == [2, 2]
    assert all(0 < r["masked"] < 1 for r in rows)
    loop, steps = [], []
    real = update.step

    def counted(model, optimizer, *rest):
        steps.append(1)
        loop.append(optimizer)
        return real(model, optimizer, *rest)

    monkeypatch.setattr(update, "step", counted)
    again = opd(on_disk, tmp_path, minibatches=2, epochs=2, optim=OPTIM, **keys)
    assert [plain(r) for r in carry_out(again)] == [plain(r) for r in rows]
    assert len(steps) == 4 and all(float(s["step"]) == 4 for s in loop[0].state.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_without_tokens_moves_nothing(on_disk, tmp_path, monkeypatch, dtype):
    """Momentum and decay would: three steps of which the last two are masked end as one does."""
    masked(monkeypatch, lambda done, b: done == 0)
    keys = CREDIT | {"optim": OPTIM, "runtime": {"dtype": dtype, "master_weights": "float32"}}
    one, three = (opd(on_disk, tmp_path, steps=n, **keys) for n in (1, 3))
    carry_out(one)
    rows = carry_out(three)
    assert same(weights(one), weights(three))
    assert [r.get("empty_updates") for r in rows] == [None, 1, 1]
    assert [r["masked"] for r in rows] == [0, 1, 1]
    assert [r["loss"] for r in rows[1:]] == [0, 0] and [r["grad_norm"] for r in rows[1:]] == [0, 0]
    assert "skipped" not in rows[1]


class Stopped(Context):
    """A stage that is asked to stop after its first step."""

    def check(self):
        self.stop = self.attempt == 1 and (self.folder / "rollouts").exists()
        super().check()


@pytest.mark.parametrize("first", [True, False])
def test_a_stage_goes_on_after_a_step_without_tokens(on_disk, tmp_path, monkeypatch, first):
    """The first step masked: there are no moments yet. The stage ends as one that was not cut."""
    masked(monkeypatch, lambda done, b: (done == 0) != first or done == 2)
    keys = CREDIT | {"optim": OPTIM, "steps": 3}
    keys["runtime"] = {"log_rollouts_every": 1}
    whole, cut = (opd(on_disk, tmp_path, context=c, **keys) for c in (Context, Stopped))
    carry_out(whole)
    with pytest.raises(Interrupted):
        carry_out(cut)
    rows = carry_out(Context(cut.run, cut.recipe, "it", attempt=2))
    assert same(weights(whole), weights(cut))
    assert [r.get("empty_updates", 0) for r in rows] == ([1, 0, 0] if first else [0, 1, 0])


def test_a_stage_that_learns_from_no_token_fails(on_disk, tmp_path, monkeypatch):
    masked(monkeypatch, lambda done, b: False)
    ctx = opd(on_disk, tmp_path, **CREDIT)
    with pytest.raises(StageFailed, match="no step had anything to train on") as caught:
        carry_out(ctx)
    assert "masks" in caught.value.hint and not (ctx.folder / "output").exists()


def test_a_factor_of_zero_everywhere_is_no_token(on_disk, tmp_path):
    """No entropy is above eopd's tau: every weight is 0, though no mask took it."""
    opens = {"objectives": {"divergence": {"weights": {"eopd": {"tau": 50.0}}}}, "signals": {}}
    with pytest.raises(StageFailed, match="no step had anything to train on"):
        carry_out(opd(on_disk, tmp_path, **opens))


def test_gates_that_let_nothing_through_move_nothing():
    model = make_model()
    spans = spans_of()
    columns = {k: v.float() for k, v in pg_columns(model, spans).items()}
    optimizer = update.make_optimizer(model, Optim(weight_decay=0.1))
    result = update.accumulate(model, update.Batch(spans, columns, pg_terms()), Pass())
    assert update.step(model, optimizer, 1e-2, 1.0, result.loss, result.shut)[1]
    before = {n: p.detach().clone() for n, p in model.net.named_parameters()}
    shut = columns | {"behaviour": columns["policy"] + 50.0}
    result = update.accumulate(model, update.Batch(spans, shut, pg_terms()), Pass())
    assert result.shut
    assert update.step(model, optimizer, 1e-2, 1.0, result.loss, result.shut) == (0.0, False)
    assert same(before, dict(model.net.named_parameters()))
    even = columns | {"advantage": torch.zeros_like(columns["advantage"])}  # equal rewards: it does
    result = update.accumulate(model, update.Batch(spans, even, pg_terms()), Pass())
    assert update.step(model, optimizer, 1e-2, 1.0, result.loss, result.shut) == (0.0, True)


def test_the_schedule_goes_by_the_steps_number(on_disk, tmp_path, monkeypatch):
    masked(monkeypatch, lambda done, b: done != 1)
    optim = {"lr": 1e-3, "schedule": "linear", "final": 0.1}
    rows = carry_out(opd(on_disk, tmp_path, steps=4, optim=optim, **CREDIT))
    assert [r["lr"] for r in rows] == pytest.approx([1e-3, 7e-4, 4e-4, 1e-4])
    assert rows[-1]["lr"] == 1e-4
