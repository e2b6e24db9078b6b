"""Architectures of transformers through the whole step: load, sample, score, train, save, reload.

Random models in Hugging Face format, made here; against transformers' own forward of each response
alone and autograd through it.
"""

import json

import pytest
import torch
import transformers
from architectures import SHAPES, write
from one_step import First, apart, by_transformers, opd, said

from opdctl.errors import UsageError
from opdctl.models.logits_check import isolates_packed_sequences
from opdctl.models.model import load, save
from opdctl.models.packing import pack
from opdctl.rollout.engines.transformers import Transformers
from opdctl.scoring.score import score
from opdctl.train import update
from opdctl.types import ScoreRequest

KEYS = {
    "signals": {"reverse_kl": {}},
    "objectives": {"policy_gradient": {}, "divergence": {"direction": "forward"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts of unequal length; models are written beside them."""
    place = tmp_path_factory.mktemp("models")
    rows = [{"prompt": "7" * (i % 7) + f"+{i}=", "answer": str(i)} for i in range(12)]
    (place / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_of_every_architecture(name, folder, tmp_path):
    write(folder / f"{name} s", name)
    write(folder / f"{name} t", name, seed=1)
    keys = KEYS | {"sampling": {"max_tokens": 9, "temperature": 0.7}}
    first = First(opd(folder, tmp_path, student=f"{name} s", teacher=f"{name} t", **keys))
    model, rollouts, columns = first.model, first.rollouts, first.columns
    assert len({len(r.prompt_ids) for r in rollouts}) > 2  # padded on the left in the sampler
    ours_NV = by_transformers(model, rollouts, 0.7, model.valid_V)
    theirs_NV = by_transformers(load(str(folder / f"{name} t")), rollouts, 0.7, model.valid_V)
    theirs_NV = theirs_NV.detach()
    assert (columns["behaviour"] - said(ours_NV, rollouts)).abs().max() < 2e-5
    assert (columns["teacher"] - said(theirs_NV, rollouts)).abs().max() < 2e-5
    assert (columns["behaviour"] - columns["teacher"]).abs().max() > 0.1

    loss, grad, _ = first.gradient(micro_batch=4)
    lengths = torch.tensor([r.length for r in rollouts])
    weight_N = torch.repeat_interleave(1 / (lengths * len(rollouts)), lengths)
    credit_N = columns["teacher"] - columns["behaviour"]
    divergence_N = (theirs_NV.exp() * (theirs_NV - ours_NV)).nan_to_num().sum(-1)
    ours_N = said(ours_NV, rollouts, detach=False)
    expected = (weight_N * (divergence_N - credit_N * ours_N)).sum()
    trained = [p for p in model.net.parameters() if p.requires_grad]
    exact = torch.autograd.grad(expected, trained, allow_unused=True)
    assert abs(loss - float(expected.detach())) < 1e-4
    assert apart(grad, torch.cat([g.flatten() for g in exact if g is not None])) < 1e-3

    before = {n: p.detach().clone() for n, p in model.net.named_parameters()}
    optimizer = update.make_optimizer(model, first.optim)
    assert update.step(model, optimizer, 1e-2, 1.0)[1]
    assert any((p - before[n]).abs().max() > 5e-3 for n, p in model.net.named_parameters())
    save(model, tmp_path / "out")
    ids = torch.tensor([rollouts[0].prompt_ids])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").train(False)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model.net(ids).logits)
    again = load(str(tmp_path / "out"))
    assert torch.equal(again.backbone(ids).last_hidden_state, model.backbone(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"logits_scaling": 4.0}, "are off from its own by"), ({"is_causal": False}, "sees later")],
)
def test_an_architecture_that_would_be_computed_wrongly_is_refused(
    folder, tmp_path, monkeypatch, change, says
):
    """A factor that is not known here; attention in both directions."""
    write(tmp_path / "m", "granite", **change)
    if "logits_scaling" in change:
        monkeypatch.setattr("opdctl.models.model.softcap_and_scale", lambda config: (None, 1.0))
    with pytest.raises(UsageError, match=says):
        load(str(tmp_path / "m"))


def test_a_model_that_cannot_be_sampled_from_is_refused(tmp_path):
    """RWKV takes its state under another name: each token would be drawn from the last alone."""
    write(tmp_path / "m", "rwkv")
    model = load(str(tmp_path / "m"))
    with pytest.raises(UsageError, match="rwkv cannot be sampled from here"):
        Transformers(model, 8).generate([[5, 6]], [1], temperature=1.0, max_tokens=2)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "deepseek_v3", "gpt2"])
def test_sequences_in_one_row_are_as_in_rows_of_their_own(name, folder, tmp_path):
    """Scores, loss and gradient without padding equal those with it, windows included."""
    if not (folder / f"{name} s").exists():
        write(folder / f"{name} s", name)
        write(folder / f"{name} t", name, seed=1)
    results = []
    for packing in ("padded", "packed"):
        keys = KEYS | {"sampling": {"max_tokens": 9}, "runtime": {"packing": packing}}
        keys |= {"student": f"{name} s", "teacher": f"{name} t"}
        ctx = opd(folder, tmp_path, **keys)
        first = First(ctx)
        assert first.model.one_row == (packing == "packed")
        results.append((first.columns["teacher"], *first.gradient(micro_batch=4)[:2]))
    (scores, loss, grad), (packed_scores, packed_loss, packed_grad) = results
    assert (scores - packed_scores).abs().max() < 1e-5 and abs(loss - packed_loss) < 1e-5
    assert apart(packed_grad, grad) < 1e-4


def test_one_row_in_float64(model64):
    """Check that packed and padded rows agree to 1e-12."""
    spans = [ScoreRequest(tuple(range(3, 3 + n)), n // 3) for n in (4, 9, 6)]
    model64.net.requires_grad_(True)
    grads, rows = [], []
    for model64.one_row in (False, True):
        packed = pack(spans, model64.pad, one_row=model64.one_row)
        assert packed.ids_BT.shape == ((1, 19) if model64.one_row else (3, 9))
        hidden_ND = model64.backbone(**packed.inputs).last_hidden_state.flatten(0, 1)
        rows.append(hidden_ND[packed.prediction_N])
        model64.net.zero_grad()
        rows[-1].square().sum().backward()
        kept = [p.grad.flatten() for p in model64.net.parameters() if p.grad is not None]
        grads.append(torch.cat(kept))
        logprobs_N = score(model64, spans).logprobs_N
        grads.append(logprobs_N)
    assert (rows[0] - rows[1]).abs().max() < 1e-12
    assert apart(grads[2], grads[0]) < 1e-12 and (grads[3] - grads[1]).abs().max() < 1e-12


def test_sequences_that_would_see_each_other_are_not_packed(folder):
    """GPT-OSS in transformers 5.23 makes its mask without the positions."""
    write(folder / "seen", "gpt_oss")
    with pytest.raises(UsageError, match="see each other in gpt_oss") as caught:
        load(str(folder / "seen"), packing="packed")
    assert caught.value.hint == "runtime.packing=padded"
    assert not isolates_packed_sequences(load(str(folder / "seen")), required=False)
