"""Types, attention and memory of a stage: float32 copies of bfloat16 parameters, implementations of
attention, activations computed again."""

import pytest
import torch
from architectures import DROPPING, write
from one_step import apart, opd, prompts
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from conftest import make_model
from opdctl.config.settings import Optim, Runtime
from opdctl.errors import Interrupted, UsageError
from opdctl.loss.objectives.nll import Nll
from opdctl.models import tensor_file
from opdctl.models.gradient_checkpointing import enable_checkpointing
from opdctl.models.master_weights import MasterWeights
from opdctl.models.model import Model, load
from opdctl.run.rundir import read_rows
from opdctl.scoring.asks import Pass
from opdctl.train import update
from opdctl.train.context import Context
from opdctl.train.gradient_sums import wide_sums
from opdctl.types import ScoreRequest
from running import carry_out, one_stage


def test_when_copies_are_kept():
    kept = {
        (dtype, how): [
            Runtime(dtype=dtype, master_weights=how).masters_of(lr) for lr in (1e-5, 2e-5)
        ]
        for dtype in ("bfloat16", "float32")
        for how in ("auto", "float32", "none")
    }
    assert kept["bfloat16", "auto"] == [True, False] and kept["bfloat16", "float32"] == [True] * 2
    assert sum(map(sum, kept.values())) == 3


def test_the_optimizer_moves_float32_copies():
    """Gradients of several passes are summed in float32, the step is AdamW's on the copies, and a
    parameter is its copy rounded."""
    model = make_model(dtype="bfloat16")
    names = dict(model.net.named_parameters())
    plain = {n: nn.Parameter(p.detach().float()) for n, p in names.items()}
    model.masters = MasterWeights(model.net)
    optim = Optim(lr=1e-6, weight_decay=0.1)
    ours = update.make_optimizer(model, optim)
    matrices = [p for p in plain.values() if p.ndim > 1]
    vectors = [p for p in plain.values() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.95), fused=True)
    twin = make_model(dtype="bfloat16")
    for step in range(3):
        for part in range(4):
            ids = torch.arange(5 + part, 15)[None] + step
            model.own_logits(ids).logsumexp(-1).sum().backward()
            twin.net.zero_grad()
            twin.own_logits(ids).logsumexp(-1).sum().backward()
            for name, parameter in twin.net.named_parameters():
                grad = parameter.grad.float()
                mine = plain[name]
                mine.grad = grad if mine.grad is None else mine.grad + grad
        norm, taken = update.step(model, ours, 1e-6, 1.0)
        assert taken and all(p.grad is None for p in names.values())
        expected = torch.nn.utils.clip_grad_norm_(plain.values(), 1.0, foreach=True)
        assert abs(norm - float(expected)) < 1e-5 * norm
        theirs.step()
        theirs.zero_grad()
        with torch.no_grad():
            for name, parameter in twin.net.named_parameters():
                parameter.copy_(plain[name])
        for name, parameter in names.items():
            assert torch.equal(model.masters.named[name], plain[name]), name
            assert torch.equal(parameter, plain[name].bfloat16()), name


def relative_error(model, micro_batch, exact):
    """The distance of the gradient to the exact one as a share of it; without one, the gradient."""
    spans, terms = many_spans(), [update.LossTerm(Nll(Nll.Config()))]
    model.net.zero_grad(set_to_none=True)
    update.accumulate(model, update.Batch(spans, {}, terms), Pass(micro_batch=micro_batch))
    grads = dict(model.net.named_parameters())
    assert {p.grad.dtype for p in grads.values()} == {next(iter(grads.values())).dtype}
    ours = torch.cat([p.grad.double().flatten() for p in grads.values()])
    return ours if exact is None else apart(ours, exact)


def many_spans(count=512):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(3, 40, (count, 5), generator=generator).tolist()
    return [ScoreRequest(tuple(ids), 2) for ids in draws]


def test_micro_batches_of_bfloat16_are_summed_in_float32():
    """512 of one sequence are as near the exact gradient as few large ones: a sum in bfloat16 had
    three times their error. One pass, and float32, have no sum of their own."""
    model, wide = make_model(dtype="bfloat16"), make_model()
    wide.net.load_state_dict({n: w.float() for n, w in model.net.state_dict().items()})
    exact = relative_error(wide, 64, None)  # of the rounded weights
    one, many = (relative_error(model, n, exact) for n in (512, 1))
    assert many < 1.1 * one and one < 0.012
    hooks = [p._post_accumulate_grad_hooks for p in model.net.parameters()]
    assert not any(hooks)  # none is left behind


def test_a_pass_that_fails_leaves_no_hook_behind():
    model = make_model(dtype="bfloat16")
    with pytest.raises(ZeroDivisionError), wide_sums(model, 2):
        raise ZeroDivisionError
    assert not any(p._post_accumulate_grad_hooks for p in model.net.parameters())
    with wide_sums(model, 1):
        assert not any(p._post_accumulate_grad_hooks for p in model.net.parameters())


class Stopped(Context):
    """A stage that is asked to stop after two steps."""

    def check(self):
        self.stop = len(read_rows(self.folder / "metrics.jsonl")) >= 2
        super().check()


def test_small_steps_in_bfloat16_are_kept_and_resumed(on_disk, tmp_path):
    """Check that nearly every copy has moved and hardly one parameter, and the sampler
    and the trainer agree as far as bfloat16 does."""
    keys = {"runtime": {"dtype": "bfloat16"}, "optim": {"lr": 1e-6}, "steps": 4}
    whole, cut = (opd(on_disk, tmp_path, context=c, **keys) for c in (Context, Stopped))
    rows = carry_out(whole)
    assert all(r["logprob_gap"] < 0.05 for r in rows)
    with pytest.raises(Interrupted):
        carry_out(cut)
    kept = tensor_file.read(next((cut.folder / "checkpoints").glob("*/weights.safetensors")))
    start = load(str(on_disk / "s"), dtype="bfloat16").net.state_dict()
    assert all(w.dtype == torch.float32 for w in kept.values())
    moved = [(w != start[n].float()).float().mean() for n, w in kept.items() if "proj" in n]
    rounded = [(w.bfloat16() != start[n]).float().mean() for n, w in kept.items() if "proj" in n]
    assert min(moved) > 0.9 and max(rounded) < 0.1
    carry_out(Context(cut.run, cut.recipe, "it", attempt=2))
    ours, theirs = (c.folder / "output" / "model.safetensors" for c in (whole, cut))
    assert ours.read_bytes() == theirs.read_bytes()
    assert {w.dtype for w in tensor_file.read(ours).values()} == {torch.bfloat16}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_the_attention_asked_for(on_disk, tmp_path, attn):
    ctx = opd(on_disk, tmp_path, runtime={"attn": attn})
    model = ctx.models.student()
    assert {m.config._attn_implementation for m in model.net.modules() if hasattr(m, "config")} == {
        attn
    }
    assert ctx.models.frozen(str(on_disk / "t")).net.config._attn_implementation == attn
    rows = carry_out(ctx)
    assert all(r["logprob_gap"] < 1e-5 for r in rows)


def test_an_attention_that_is_not_there(on_disk, tmp_path):
    with pytest.raises(UsageError, match="Flash") as caught:
        opd(on_disk, tmp_path, runtime={"attn": "flash_attention_2"}).models.student()
    assert "runtime.attn" in caught.value.hint


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "deepseek_v3", *DROPPING])
def test_activations_are_computed_again(name, tmp_path):
    """Check that layers run twice, to the same gradient, only if needed; dropout stays off."""
    write(tmp_path, name)
    twice = load(str(tmp_path), gradient_checkpointing=True)
    once = load(str(tmp_path))
    calls = []
    for layer in (m for m in twice.net.modules() if hasattr(m, "gradient_checkpointing")):
        if type(layer).__name__.endswith(("Layer", "Block")):
            inner = next(layer.children())
            inner.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.arange(6, 18)[None]
    grads, counts = [], []
    for model in (twice, once):
        calls.clear()
        model.backbone(ids).last_hidden_state.square().sum().backward()
        counts.append(len(calls))
        grads_of_step = [p.grad.flatten() for p in model.net.parameters() if p.grad is not None]
        grads.append(torch.cat(grads_of_step))
    assert counts[0] == 4 and apart(*grads) < 1e-6
    calls.clear()
    with torch.no_grad():
        twice.backbone(ids)
    assert len(calls) == 2 and not any(m.training for m in twice.net.modules())


KINDS = {
    "pretrain": {"model": {"hidden": 16, "layers": 2}},
    "sft": {},
    "orm": {"prompts": {"samples": 2, "per_step": 4}, "sampling": {"max_tokens": 4}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_trains_heeds_how_passes_are_made(on_disk, tmp_path, monkeypatch, kind):
    """Attention, one row, activations again: looked at in the passes that need a gradient."""
    start = {} if kind == "pretrain" else {"student": str(on_disk / "s")}
    start |= {"policy": str(on_disk / "s")} if kind == "orm" else {}
    keys = {"kind": kind, "steps": 1, "prompts": {"per_step": 4}, **start, **KINDS[kind]}
    data = {"sums": prompts(on_disk)}
    ways = {"attn": "eager", "packing": "packed", "gradient_checkpointing": True}
    seen = []
    backbone = Model.backbone

    def watched(model, input_ids, **options):
        if torch.is_grad_enabled():
            layer = next(m for m in model.net.modules() if isinstance(m, Qwen3DecoderLayer))
            calls = []
            layer.self_attn.register_forward_hook(
                lambda *_: calls.append(1) if torch.is_grad_enabled() else None
            )
            attn = model.net.config._attn_implementation
            seen.append((attn, len(input_ids) == 1, calls))
        return backbone(model, input_ids, **options)

    monkeypatch.setattr(Model, "backbone", watched)
    rows = []
    for name, runtime in (("plain", {}), ("ways", ways)):
        seen.clear()
        rows.append(carry_out(one_stage(tmp_path / name, data, runtime=runtime, **keys)))
        kinds = {(attn, one_row, len(calls)) for attn, one_row, calls in seen}
        assert kinds == {("eager", True, 2) if runtime else ("sdpa", False, 1)}
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"], abs=1e-5)
    gone = {"attn": "flash_attention_2"}
    with pytest.raises(UsageError, match="Flash"):
        carry_out(one_stage(tmp_path / "gone", data, runtime=gone, **keys))


def test_what_cannot_be_computed_again():
    with pytest.raises(UsageError, match="again"):
        net = nn.Linear(2, 2)
        net.config = make_model().net.config
        enable_checkpointing(net, "m")
