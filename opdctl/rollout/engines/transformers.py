"""Batched sampling with a KV cache through transformers, with the sampler's own log-probs.

Token t of a sample is an inverse CDF in float64 at the sample's own counter-based number, so its
tokens do not depend on the other samples of its batch. The full distribution is sampled, without
top-k or top-p, so the log-probs are those of the distribution drawn from. With a log, each token is
logged before the next is drawn; a batch that was logged to its end is not sampled again, and one
that was cut goes on where it stopped.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opdctl import draws
from opdctl.errors import UsageError
from opdctl.rollout.engines._engine import Engine, Sample

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


class Transformers(Engine):
    """Sampling in this process with the weights as they stand; nothing to publish."""

    revision = 1

    def __init__(
        self, model, batch: int, check: Callable[[], None] = lambda: None, wal=None, blend=None
    ) -> None:
        """Prepare to sample from a model.

        Args:
            batch: most samples in a batch.
            check: called at every token; may raise to stop.
            wal: the log of tokens; None logs nothing.
            blend: another model of the same tokens, and its share in every token's distribution.
        """
        self.model, self.batch, self.check, self.wal = model, batch, check, wal
        self.blend = blend
        self.version: int | str = 0

    def publish(self, version: int | str) -> None:
        """Name the version of the trainer's weights that the log's entries are of."""
        self.version = version

    def release(self) -> None:
        """Do nothing: no memory is held between rollouts."""

    def generate(
        self, prompts: list[list[int]], keys: list[int], *, temperature: float, max_tokens: int
    ) -> list[Sample]:
        """Return one sample for each prompt and key.

        Args:
            prompts: token ids; ragged.
            keys: 64 bits each, which determine the draws.

        Raises:
            UsageError: the model cannot be sampled from step by step with left padding, or reads
                fewer tokens than a prompt and its response may have.
            Interrupted: a stop was asked for, at any token.
        """
        import numpy as np

        most = max(map(len, prompts), default=0) + max_tokens
        for model in [self.model, *(self.blend or ())[:1]]:
            model.require_room(most, "a prompt and its response")
            if not model.sampling_checked and not reads_additive_mask(model):
                require_stepwise_sampling(model)
            model.sampling_checked = True
        samples: list[Sample] = []
        for start in range(0, len(prompts), self.batch):
            some = slice(start, start + self.batch)
            samples += self._sample_batch(
                prompts[some], np.array(keys[some], np.uint64), temperature, max_tokens
            )
        return samples

    def _sample_batch(
        self, prompts: list[list[int]], keys_B: np.ndarray, temperature: float, max_tokens: int
    ) -> list[Sample]:
        import numpy as np
        import torch

        model = self.model
        tokens_BT = np.full((len(prompts), max_tokens), model.eos)
        logprobs_BT = np.zeros((len(prompts), max_tokens))
        request = (model.name, self.version, prompts, keys_B.tolist(), temperature, max_tokens)
        if self.blend:
            request += (self.blend[0].name, self.blend[1])
        name = f"wave {draws.key(*request):016x}"
        logged = self._recall(name, tokens_BT, logprobs_BT)
        ended_B = np.isin(tokens_BT[:, :logged], model.ends).any(1)
        if logged == max_tokens or ended_B.all():
            return to_samples(tokens_BT, logprobs_BT, model.ends)
        models = [model, self.blend[0]] if self.blend else [model]
        passes = _Passes(models, prompts, max_tokens, all(map(reads_additive_mask, models)))
        alive = np.arange(len(prompts))  # rows still in the batch
        ended_B = np.zeros(len(prompts), bool)
        token_B: torch.Tensor | None = None
        with torch.inference_mode():
            for t in range(max_tokens):
                self.check()
                last = passes.of_prompts() if token_B is None else passes.of_tokens(token_B)
                if t < logged:
                    token_B = torch.from_numpy(tokens_BT[alive, t]).to(model.device)
                else:
                    token_B, logprob_B = draw_tokens(
                        self._logits(last, temperature), draws.uniform(keys_B[alive], t)
                    )
                    tokens_BT[alive, t] = token_B.cpu().numpy()
                    logprobs_BT[alive, t] = logprob_B.cpu().numpy()
                    self._log(name, alive, tokens_BT[alive, t], logprobs_BT[alive, t])
                ended_B[alive] |= np.isin(tokens_BT[alive, t], model.ends)
                going = ~ended_B[alive]
                if not going.any():
                    break
                if going.mean() < 0.7:  # drop the rows that ended
                    kept_B = torch.from_numpy(np.flatnonzero(going)).to(model.device)
                    passes.keep(kept_B)
                    token_B, alive = token_B[kept_B], alive[going]
        return to_samples(tokens_BT, logprobs_BT, model.ends)

    def _logits(self, last, temperature: float):
        """Return the model's logits, or the log of the mixture's probabilities. Shape [B, V]."""
        logits_BV = self.model.logits(last[0], temperature)
        if not self.blend:
            return logits_BV
        other, alpha = self.blend
        if not alpha:
            return logits_BV
        valid_V = self.model.valid_V  # heads of the two may be padded to different widths
        ours_BV = logits_BV[:, :valid_V].log_softmax(-1) + math.log1p(-alpha)
        theirs_BV = other.logits(last[1], temperature)[:, :valid_V].log_softmax(-1)
        return ours_BV.logaddexp(theirs_BV + math.log(alpha))

    def _recall(self, name: str, tokens_BT, logprobs_BT) -> int:
        """Fill in the tokens an earlier attempt drew; return how many per response."""
        entries = self.wal.get(name) if self.wal else []
        for t, entry in enumerate(entries):
            tokens_BT[entry["alive"], t] = entry["tokens"]
            logprobs_BT[entry["alive"], t] = entry["logprobs"]
        return len(entries)

    def _log(self, name: str, alive, tokens_B, logprobs_B) -> None:
        if self.wal is not None:
            self.wal.put(name, {"alive": alive, "tokens": tokens_B, "logprobs": logprobs_B})


class _Passes:
    """The forward passes of a batch, one token after another, each model with a cache of its own.

    A prompt is read once, whatever the size of its group.
    """

    def __init__(
        self, models: list[Any], prompts: list[list[int]], most: int, additive: bool
    ) -> None:
        """Lay out the prompts, padded on the left.

        Args:
            models: of the same tokens.
            prompts: one for each row of the batch; those of a group are equal.
            most: the tokens that may follow them.
            additive: every model reads an additive mask.
        """
        import torch
        from transformers.cache_utils import DynamicCache, DynamicLayer

        device = models[0].device
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        place = {prompt: u for u, prompt in enumerate(distinct)}
        self.owner_B = torch.tensor([place[tuple(p)] for p in prompts], device=device)
        self.length = max(map(len, distinct))
        pads = [self.length - len(p) for p in distinct]
        ids_UT = torch.full((len(distinct), self.length), models[0].pad, dtype=torch.long)
        for u, prompt in enumerate(distinct):
            ids_UT[u, pads[u] :] = torch.tensor(prompt)
        pad_U1 = torch.tensor(pads, device=device)[:, None]
        self.ids_UT = ids_UT.to(device)
        self.seen_BT = torch.arange(self.length + most, device=device) >= pad_U1
        self.position_BT = (torch.arange(self.length, device=device) - pad_U1).clamp(min=0)
        self.models, self.names = models, [cache_name(m.net.base_model) for m in models]
        self.caches = [DynamicCache(config=m.net.config) for m in models]
        layers = [layer for cache in self.caches for layer in cache.layers]
        plain = additive and all(type(layer) is DynamicLayer for layer in layers)
        dtype = next(models[0].net.parameters()).dtype
        self.mask = additive_mask(dtype) if plain else padding_mask

    def of_prompts(self) -> list[Tensor]:
        """Return each model's hidden rows after the prompts, one a row of the batch. [B, D]."""
        last = self._run(self.ids_UT, self.mask(self.seen_BT[:, : self.length], self.length))
        last = [hidden_UD[self.owner_B] for hidden_UD in last]
        self.position_BT = self.position_BT[:, -1:]
        self.keep(self.owner_B)
        return last

    def of_tokens(self, token_B: Tensor) -> list[Tensor]:
        """Return each model's hidden rows after one more token of every row. [B, D]."""
        self.length, self.position_BT = self.length + 1, self.position_BT + 1
        return self._run(token_B[:, None], self.mask(self.seen_BT[:, : self.length], 1))

    def keep(self, index_B: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.seen_BT, self.position_BT = self.seen_BT[index_B], self.position_BT[index_B]
        for cache in self.caches:
            keep_rows(cache, index_B)

    def _run(self, ids_BT: Tensor, mask: Tensor) -> list[Tensor]:
        inputs = {
            "input_ids": ids_BT,
            "attention_mask": mask,
            "position_ids": self.position_BT,
            "use_cache": True,
        }
        outputs = [
            m.backbone(**inputs, **{name: cache})
            for m, name, cache in zip(self.models, self.names, self.caches, strict=True)
        ]
        return [out.last_hidden_state[:, -1] for out in outputs]


def reads_additive_mask(model) -> bool:
    """Return True for a model as pretrain stages make: architecture and attention are known to read
    an additive mask and to cache nothing but keys and values."""
    config = model.net.config
    return config.model_type == "qwen3" and config._attn_implementation in ("eager", "sdpa")


def require_stepwise_sampling(model) -> None:
    """Check that sampling step by step, padded, has the log-probs of the full sequence alone.

    This catches states that the cache does not keep, and padding that is not masked.

    Raises:
        UsageError: the log-probs differ; says by how much.
    """
    import numpy as np
    import torch

    prompts = [[i % model.valid_V for i in range(n)] for n in (3, 7)]
    samples = Transformers(model, 2)._sample_batch(prompts, np.array([1, 2], np.uint64), 1.0, 3)
    gap = 0.0
    with torch.inference_mode():
        for prompt, sample in zip(prompts, samples, strict=True):
            ids_1T = torch.tensor([[*prompt, *sample.ids]], device=model.device)
            rows = model.backbone(ids_1T, use_cache=False).last_hidden_state[
                0, len(prompt) - 1 : -1
            ]
            own = model.logits(rows).log_softmax(-1).gather(-1, ids_1T[0, len(prompt) :, None])
            drawn = torch.tensor(sample.logprobs, device=own.device)
            gap = max(gap, float((own[:, 0] - drawn).abs().max()))
    if gap > (0.5 if next(model.net.parameters()).dtype.itemsize < 4 else 1e-3):
        kind = model.net.config.model_type
        raise UsageError(
            f"{model.name}: {kind} cannot be sampled from here: its log-probs step by step are "
            f"off by {gap:.3g} nats from those of the whole",
            "transformers keeps its state in another way than in models with keys and values",
        )


def additive_mask(dtype):
    """Return a function that makes masks [B, 1, queries, T] from the tokens that are no padding.

    A mask is 0 where attention is allowed, else the lowest number, which eager and sdpa read alike.
    It is for models as a pretrain stage makes, where every layer sees all earlier tokens: at tiny
    sizes transformers' own way of making masks costs as much as the layers.
    """
    import torch

    def mask(seen_BT, queries: int):
        allowed = seen_BT[:, None, None, :]
        if queries > 1:
            square_TT = torch.ones(queries, queries, dtype=torch.bool, device=seen_BT.device)
            self_TT = torch.eye(queries, dtype=torch.bool, device=seen_BT.device)
            allowed = (allowed & square_TT.tril()) | self_TT  # padding attends to itself
        zeros = torch.zeros(allowed.shape, dtype=dtype, device=seen_BT.device)
        return zeros.masked_fill(~allowed, torch.finfo(dtype).min)

    return mask


def cache_name(module) -> str:
    """Return the argument in which a module of transformers takes its cache: ``cache`` since 5.24,
    ``past_key_values`` before."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def keep_rows(cache, index_B) -> None:
    """Keep these rows of a batch, in this order, in each layer's state.

    The state is keys and values, or that of a linear attention, which has a method of its own.
    """
    from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            LinearAttentionCacheLayerMixin.reorder_cache(layer, index_B)
        if isinstance(layer, DynamicLayer):
            layer.batch_select_indices(index_B)


def padding_mask(seen_BT, queries: int):
    """Return the tokens that are no padding, [B, T], as 1.

    The model makes the mask of each layer from it, windows included, and attentions without such a
    mask (flash) read it directly.
    """
    return seen_BT.long()


def draw_tokens(logits_BV, uniform_B: np.ndarray):
    """Draw tokens by inverse CDF in float64: the first id whose cumulative probability exceeds u.

    Returns:
        Ids [B] and their log-probs [B] in the logits' precision.
    """
    import torch

    cdf_BV = logits_BV.double().softmax(-1).cumsum(-1)
    point_B1 = torch.from_numpy(uniform_B).to(logits_BV.device)[:, None] * cdf_BV[:, -1:]
    token_B = torch.searchsorted(cdf_BV, point_B1, right=True)[:, 0]
    token_B = token_B.clamp(max=logits_BV.shape[-1] - 1)
    logprob_B = logits_BV.gather(-1, token_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
    return token_B, logprob_B


def to_samples(
    tokens_BT: np.ndarray, logprobs_BT: np.ndarray, ends: tuple[int, ...]
) -> list[Sample]:
    """Cut each row after the first token that ends a response; without one it is truncated."""
    samples = []
    for row, logprobs in zip(tokens_BT.tolist(), logprobs_BT.tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in ends), 0)
        stop = end or len(row)
        samples.append(Sample(row[:stop], logprobs[:stop], not end))
    return samples
