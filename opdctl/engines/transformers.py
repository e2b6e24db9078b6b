"""Batched sampling with a KV cache through transformers, with the sampler's own log-probs.

Draw t of a sample is an inverse CDF in float64 at the sample's own counter-based number, so its
tokens do not depend on the batch it happens to be in. The whole distribution is sampled: no
top-k, no top-p, so the log-probs are those of what was drawn from. With a log, each token is
logged before the next is drawn; a wave that was logged whole is not sampled again, and one that was
cut goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opdctl.core import draws

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Sample:
    """One response.

    Attributes:
        ids: its tokens, with the end token if it came to one.
        logprobs: of each token under the distribution sampled from.
        truncated: cut at the limit.
    """

    ids: list[int]
    logprobs: list[float]
    truncated: bool


class Transformers:
    """Sampling in this process with the weights as they stand; nothing to publish."""

    revision = 1
    holds = False

    def __init__(
        self, model, wave: int, check: Callable[[], None] = lambda: None, wal=None
    ) -> None:
        self.model, self.wave, self.check, self.wal = model, wave, check, wal

    def publish(self, version: int) -> None:
        """The weights are the trainer's own."""

    def rest(self) -> None:
        """Nothing is held between rollouts."""

    def generate(
        self, prompts: list[list[int]], keys: list[int], *, temperature: float, max_tokens: int
    ) -> list[Sample]:
        """One sample for each prompt and key.

        Args:
            prompts: token ids; ragged.
            keys: 64 bits each; they determine the draws.

        Raises:
            Interrupted: the stop flag was seen, at any token.
        """
        import numpy as np

        samples: list[Sample] = []
        for start in range(0, len(prompts), self.wave):
            part = slice(start, start + self.wave)
            samples += self._wave(
                prompts[part], np.array(keys[part], np.uint64), temperature, max_tokens
            )
        return samples

    def _wave(self, prompts, keys_B, temperature, max_tokens) -> list[Sample]:
        import numpy as np
        import torch
        from transformers import DynamicCache

        model, device = self.model, self.model.device
        tokens_BT = np.full((len(prompts), max_tokens), model.eos)
        logprobs_BT = np.zeros((len(prompts), max_tokens))
        asked = (model.name, prompts, keys_B.tolist(), temperature, max_tokens)
        name = f"wave {draws.key(*asked):016x}"
        logged = self._recall(name, tokens_BT, logprobs_BT)
        ended_B = (tokens_BT[:, :logged] == model.eos).any(1)
        if logged == max_tokens or ended_B.all():
            return cut(tokens_BT, logprobs_BT, model.eos)
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        place = {prompt: u for u, prompt in enumerate(distinct)}
        owner_B = torch.tensor([place[tuple(p)] for p in prompts], device=device)
        T = max(map(len, distinct))
        ids_UT = torch.full((len(distinct), T), model.pad, dtype=torch.long)
        pads = [T - len(p) for p in distinct]
        for u, prompt in enumerate(distinct):
            ids_UT[u, pads[u] :] = torch.tensor(prompt)
        pad_U = torch.tensor(pads, device=device)
        seen_UT = torch.arange(T + max_tokens, device=device) >= pad_U[:, None]
        causal_TT = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        self_TT = torch.eye(T, dtype=torch.bool, device=device)  # padding attends to itself
        dtype = next(model.net.parameters()).dtype

        def additive(allowed):
            """0 where allowed, else the lowest number: every attention reads that alike."""
            zeros = torch.zeros(allowed.shape, dtype=dtype, device=device)
            return zeros.masked_fill(~allowed, torch.finfo(dtype).min)

        inputs = {
            "input_ids": ids_UT.to(device),
            "attention_mask": additive((seen_UT[:, None, None, :T] & causal_TT) | self_TT),
            "position_ids": (torch.arange(T, device=device) - pad_U[:, None]).clamp(min=0),
        }
        cache = DynamicCache(config=model.net.config)
        alive = np.arange(len(prompts))  # rows still in the batch
        ended_B = np.zeros(len(prompts), bool)
        with torch.inference_mode():
            for t in range(max_tokens):
                self.check()
                hidden = model.net.base_model(**inputs, past_key_values=cache, use_cache=True)
                last = hidden.last_hidden_state[:, -1]
                if t == 0:  # a prompt is read once, whatever the size of its group
                    last, seen_UT = last[owner_B], seen_UT[owner_B]
                    position_B1 = inputs["position_ids"][owner_B, -1:]
                    cache.batch_select_indices(owner_B)
                if t < logged:
                    token_B = torch.from_numpy(tokens_BT[alive, t]).to(device)
                else:
                    token_B, logprob_B = draw(
                        model.logits(last, temperature), draws.uniform(keys_B[alive], t)
                    )
                    tokens_BT[alive, t] = token_B.cpu().numpy()
                    logprobs_BT[alive, t] = logprob_B.cpu().numpy()
                    self._log(name, alive, tokens_BT[alive, t], logprobs_BT[alive, t])
                ended_B[alive] |= tokens_BT[alive, t] == model.eos
                going = ~ended_B[alive]
                if not going.any():
                    break
                position_B1 = position_B1 + 1
                if going.mean() < 0.7:  # drop the rows that ended
                    kept_B = torch.from_numpy(np.flatnonzero(going)).to(device)
                    cache.batch_select_indices(kept_B)
                    token_B, position_B1 = token_B[kept_B], position_B1[kept_B]
                    seen_UT, alive = seen_UT[kept_B], alive[going]
                inputs = {
                    "input_ids": token_B[:, None],
                    "position_ids": position_B1,
                    "attention_mask": additive(seen_UT[:, None, None, : T + t + 1]),
                }
        return cut(tokens_BT, logprobs_BT, model.eos)

    def _recall(self, name: str, tokens_BT, logprobs_BT) -> int:
        """Fill in what an earlier attempt drew; for how many tokens of a response."""
        found = self.wal.get(name) if self.wal else []
        for t, entry in enumerate(found):
            tokens_BT[entry["alive"], t] = entry["tokens"]
            logprobs_BT[entry["alive"], t] = entry["logprobs"]
        return len(found)

    def _log(self, name: str, alive, tokens_B, logprobs_B) -> None:
        if self.wal is not None:
            self.wal.put(name, {"alive": alive, "tokens": tokens_B, "logprobs": logprobs_B})


def draw(logits_BV, uniform_B: np.ndarray):
    """Inverse CDF in float64: the first id whose cumulative probability exceeds the draw.

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


def cut(tokens_BT: np.ndarray, logprobs_BT: np.ndarray, eos: int) -> list[Sample]:
    """Cut each row after its first end token; without one it is truncated."""
    samples = []
    for row, logprobs in zip(tokens_BT.tolist(), logprobs_BT.tolist(), strict=True):
        end = row.index(eos) + 1 if eos in row else len(row)
        samples.append(Sample(row[:end], logprobs[:end], eos not in row))
    return samples
