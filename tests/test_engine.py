"""The sampler: batch independence, exact log-probs, stop tokens, padded vocabulary."""

import warnings

import numpy as np
import torch

from conftest import make_model
from opdctl import draws
from opdctl.rollout.engines.transformers import Transformers, draw_tokens
from opdctl.scoring.asks import Pass
from opdctl.scoring.score import score
from opdctl.types import ScoreRequest

PROMPTS = ["a", "sort 3 1 2=", "gcd 12 18=", "rev abc=", "0123456789 abcdefgh="]


def sample(model, texts, keys, wave=64, temperature=1.0, max_tokens=12):
    prompts = [model.render(t) for t in texts]
    return prompts, Transformers(model, wave).generate(
        prompts, keys, temperature=temperature, max_tokens=max_tokens
    )


def test_tokens_do_not_depend_on_the_batch(model):
    texts = [PROMPTS[i % 5] for i in range(40)]
    keys = [draws.key(7, i) for i in range(40)]
    _, together = sample(model, texts, keys)
    for wave in (1, 7):
        _, apart = sample(model, texts, keys, wave)
        assert [s.ids for s in apart] == [s.ids for s in together]
        gap = max(
            np.abs(np.subtract(a.logprobs, b.logprobs)).max()
            for a, b in zip(apart, together, strict=True)
        )
        assert gap < 1e-5
    order = np.random.default_rng(0).permutation(40)
    _, shuffled = sample(model, [texts[i] for i in order], [keys[i] for i in order])
    assert [s.ids for s in shuffled] == [together[i].ids for i in order]


def test_transformers_warns_of_nothing_that_goes(model):
    """A name that a later release removes is a FutureWarning of this one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert len(sample(model, PROMPTS, list(range(5)))[1]) == 5


def test_logprobs_are_those_of_the_sampled_distribution(model):
    for temperature in (1.0, 0.6):
        texts = [PROMPTS[i % 5] for i in range(30)]
        prompts, samples = sample(
            model, texts, [draws.key(i) for i in range(30)], temperature=temperature
        )
        requests = [
            ScoreRequest((*p, *s.ids), len(p)) for p, s in zip(prompts, samples, strict=True)
        ]
        scored = score(model, requests, run=Pass(temperature=temperature)).logprobs_N
        sampled = torch.tensor([v for s in samples for v in s.logprobs])
        assert (scored - sampled).abs().max() < 1e-5


def test_stop_and_truncation(model):
    _, samples = sample(model, PROMPTS * 20, list(range(100)), max_tokens=5)
    assert any(s.truncated for s in samples) and not all(s.truncated for s in samples)
    for s in samples:
        assert s.truncated == (s.ids[-1] != model.eos)
        assert model.eos not in s.ids[:-1]
        assert len(s.ids) == len(s.logprobs) <= 5
        assert len(s.ids) == 5 or not s.truncated


def test_padded_rows_change_nothing():
    plain, padded = make_model(3), make_model(3, extra_rows=24)
    with torch.no_grad():
        weight = padded.net.get_input_embeddings().weight
        weight[: plain.valid_V] = plain.net.get_input_embeddings().weight
        weight[plain.valid_V :] = 50.0
        for (name, a), (_, b) in zip(
            plain.net.named_parameters(), padded.net.named_parameters(), strict=True
        ):
            if "embed" not in name:
                b.copy_(a)
    keys = [draws.key(i) for i in range(20)]
    _, ours = sample(plain, PROMPTS * 4, keys)
    _, theirs = sample(padded, PROMPTS * 4, keys)
    assert [s.ids for s in ours] == [s.ids for s in theirs]
    assert np.allclose(
        [v for s in ours for v in s.logprobs], [v for s in theirs for v in s.logprobs], atol=1e-6
    )


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(200_000, 4)
    keys = np.array([draws.key("freq", i) for i in range(200_000)], np.uint64)
    ids, _ = draw_tokens(logits, draws.uniform(keys, 0))
    share = torch.bincount(ids, minlength=4).double() / 200_000
    expected = logits[0].double().softmax(-1)
    assert share[2] == 0
    assert (share - expected).abs().max() < 5 * (0.25 / 200_000) ** 0.5


def test_draws_are_named_not_counted():
    keys = np.array([draws.key(1, 2), draws.key(1, 3)], np.uint64)
    assert draws.uniform(keys, 4)[0] == draws.uniform(keys[:1], 4)[0]
    assert len({draws.unit("a", i) for i in range(1000)}) == 1000
    assert sorted(draws.permutation(100, "x")) == list(range(100))
    assert list(draws.permutation(100, "x")) != list(draws.permutation(100, "y"))
