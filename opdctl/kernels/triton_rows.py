"""The row pass as Triton kernels, between the vendor's matrix products.

One program a row. ``_compare`` sweeps the two rows of logits once for the statistics (a running
maximum, sum and weighted sum of each side) and once more for the divergence, summed term by term
as in kernels/reference.py, and its gradient p (r - K), which it writes in the type the products
read; a jsd needs a third sweep. The per-token factor of the gradient, known only later, scales
rows of the products instead: no further sweep. ``_affine`` writes a p (plus the former) over the
logits, which with k added entries is the gradient of any function of log-probs at k ids; it is
rounded to the operands' type after they are added. fp32 logits only. An id
without mass has a logit of -inf, which is read as -1e30 where a row is summed and as a log-prob of
-1e4 where it is compared: no 0 x infinity, see kernels/reference.py. The
same source runs on a CPU under TRITON_INTERPRET=1, which is how it is tested without a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from opdctl.kernels.reference import endpoint
from opdctl.kernels.topk import log_outside, share_outside

BLOCK = 4096  # elements of a row read at once: 32 KiB of two rows in registers


@triton.jit
def _kl_term(a, b, r):
    """Return a r - a + b for r = log a - log b, as a series near r = 0: never negative; infinite
    where b alone has no mass."""
    series = a * r * r * (0.5 + r * (-1 / 6 + r * (1 / 24 - r / 120)))
    far = tl.where((r > 5e3) & (a > 0), float("inf"), a * (r - 1) + b)  # b is 0, and a is not
    return tl.where(tl.abs(r) < 0.125, series, far)


@triton.jit
def _log_mix(r, beta):
    """Return log p - log m = -log(1 + beta (e^-r - 1)), accurate where r is small."""
    x = tl.minimum(-r, 80.0)
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120))))
    y = beta * tl.where(tl.abs(x) < 0.125, series, tl.exp(x) - 1)
    u = 1 + y
    exact = u == 1
    return -tl.where(exact, y, tl.log(u) * (y / tl.where(exact, 1.0, u - 1)))


@triton.jit
def _grow(m, n, h, z, valid):
    """Add a block of logits to maximum m, sum n of e^(z - m) and h of e^(z - m) (z - m)."""
    top = tl.maximum(m, tl.max(tl.where(valid, z, -1e30), 0))
    scale = tl.exp(m - top)
    e = tl.where(valid, tl.exp(z - top), 0.0)
    h = scale * (h + (m - top) * n) + tl.sum(tl.where(valid, e * (z - top), 0.0), 0)
    return top, scale * n + tl.sum(e, 0), h, e, scale


@triton.jit
def _plus(total, x):
    """Return a running sum with the sum of a block added."""
    return total + tl.sum(x, 0)


@triton.jit
def _normalise(z_ptr, lse_ptr, entropy_ptr, stride, V, BLOCK: tl.constexpr):
    """Return the log-normaliser and the entropy of a row."""
    row = tl.program_id(0).to(tl.int64)
    m, n, h = -1e30, 0.0, 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * stride + at, mask=at < V, other=0.0)
        z = tl.maximum(z, -1e30)
        m, n, h, _, _ = _grow(m, n, h, z, at < V)
    tl.store(lse_ptr + row, m + tl.log(n))
    tl.store(entropy_ptr + row, tl.log(n) - h / n)


@triton.jit
def _logprobs(s_ptr, t_ptr, at, mask, lse_s, lse_t):
    """Return a block of both sides' log-probs, none below -1e4."""
    s = tl.load(s_ptr + at, mask=mask, other=0.0) - lse_s
    t = tl.load(t_ptr + at, mask=mask, other=0.0) - lse_t
    return tl.maximum(s, -1e4), tl.maximum(t, -1e4)


@triton.jit
def _compare(
    s_ptr,
    t_ptr,
    out_ptr,
    table_ptr,
    stride,
    V,
    C,
    beta,
    DIRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a table [5, C]: divergence, both normalisers, both entropies; and the unit gradient."""
    row = tl.program_id(0).to(tl.int64)
    ms, ns, hs, mt, nt, ht, cross = -1e30, 0.0, 0.0, -1e30, 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s = tl.load(s_ptr + row * stride + at, mask=at < V, other=0.0)
        t = tl.load(t_ptr + row * stride + at, mask=at < V, other=0.0)
        s, t = tl.maximum(s, -1e30), tl.maximum(t, -1e30)
        old_ms, old_mt, old_ns = ms, mt, ns
        ms, ns, hs, e, scale = _grow(ms, ns, hs, s, at < V)
        mt, nt, ht, _, _ = _grow(mt, nt, ht, t, at < V)
        # sum of e^(s - ms) ((s - ms) - (t - mt)): its shifts follow both maxima
        cross = scale * (cross + ((old_ms - ms) - (old_mt - mt)) * old_ns)
        cross = _plus(cross, tl.where(at < V, e * ((s - ms) - (t - mt)), 0.0))
    lse_s, lse_t = ms + tl.log(ns), mt + tl.log(nt)
    mean = cross / ns - tl.log(ns) + tl.log(nt)  # sum of p r
    value = 0.0
    if DIRECTION == "jsd":
        mean = 0.0
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            s, t = _logprobs(s_ptr, t_ptr, row * stride + at, at < V, lse_s, lse_t)
            p, q = tl.where(at < V, tl.exp(s), 0.0), tl.where(at < V, tl.exp(t), 0.0)
            r = tl.maximum(s - t, -80.0)
            a = _log_mix(r, beta)
            m = p + beta * (q - p)
            mean = _plus(mean, p * a)
            term = beta * _kl_term(q, m, a - r) + (1 - beta) * _kl_term(p, m, a)
            value = _plus(value, tl.where(at < V, term, 0.0))
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        s, t = _logprobs(s_ptr, t_ptr, row * stride + at, at < V, lse_s, lse_t)
        p, q, r = tl.exp(s), tl.exp(t), s - t
        if DIRECTION == "reverse":
            value = _plus(value, tl.where(at < V, _kl_term(p, q, r), 0.0))
            out = p * (r - mean)
        elif DIRECTION == "forward":
            value = _plus(value, tl.where(at < V, _kl_term(q, p, -r), 0.0))
            out = p - q
        else:
            out = (1 - beta) * p * (_log_mix(tl.maximum(r, -80.0), beta) - mean)
        tl.store(out_ptr + row * V + at, out.to(out_ptr.dtype.element_ty), mask=at < V)
    tl.store(table_ptr + row, value)
    tl.store(table_ptr + C + row, lse_s)
    tl.store(table_ptr + 2 * C + row, lse_t)
    tl.store(table_ptr + 3 * C + row, tl.log(ns) - hs / ns)
    tl.store(table_ptr + 4 * C + row, tl.log(nt) - ht / nt)


@triton.jit
def _affine(
    z_ptr,
    lse_ptr,
    a_ptr,
    weight_ptr,
    unit_ptr,
    stride,
    V,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set z = a p, plus weight x unit where there is a divergence; in place and in fp32."""
    row = tl.program_id(0).to(tl.int64)
    lse, a = tl.load(lse_ptr + row), tl.load(a_ptr + row)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * stride + at, mask=at < V, other=0.0)
        out = a * tl.exp(z - lse)
        if ADD:
            unit = tl.load(unit_ptr + row * V + at, mask=at < V, other=0.0).to(tl.float32)
            out += tl.load(weight_ptr + row) * unit
        tl.store(z_ptr + row * stride + at, out, mask=at < V)


class Rows:
    """A chunk of the student's logits; see kernels/chunked.py for what each method means."""

    name = "triton"

    def __init__(self, logits_CV: Tensor, operand: torch.dtype) -> None:
        self.logits_CV, self.operand = logits_CV, operand
        self.leaves: list[Tensor] = []
        self._ids: list[Tensor | int | None] = []
        self._tails: list[tuple[Tensor, Tensor]] = []
        self._normalised: tuple[Tensor, Tensor] | None = None
        self._unit_CV: Tensor | None = None

    def _lse_and_entropy(self) -> tuple[Tensor, Tensor]:
        if self._normalised is None:
            z_CV = self.logits_CV
            lse_C, entropy_C = z_CV.new_empty(2, len(z_CV))
            V = z_CV.shape[1]
            _launch(_normalise, z_CV, lse_C, entropy_C, z_CV.stride(0), V, BLOCK=_block(V))
            self._normalised = lse_C, entropy_C
        return self._normalised

    def at(self, ids_CK: Tensor, leaf: bool = True) -> Tensor:
        lse_C, _ = self._lse_and_entropy()
        logp_CK = self.logits_CV.gather(-1, ids_CK) - lse_C[:, None]
        return self._leaf(logp_CK, ids_CK) if leaf else logp_CK

    def outside(self, ids_CK: Tensor) -> Tensor:
        lse_C, _ = self._lse_and_entropy()
        raw_C = log_outside(self.logits_CV, ids_CK)
        self._tails.append((ids_CK, raw_C))
        return self._leaf(raw_C - lse_C, len(self._tails) - 1)

    def top(self, k: int) -> Tensor:
        return self.logits_CV.topk(k, dim=-1).indices

    def entropy(self) -> Tensor:
        return self._lse_and_entropy()[1]

    def divergence(self, teacher_CV: Tensor, direction: str, beta: float, ids_CK: Tensor):
        z_CV = self.logits_CV
        C, V = z_CV.shape
        table_5C = z_CV.new_empty(5, C)
        self._unit_CV = torch.empty(C, V, dtype=self.operand, device=z_CV.device)
        _launch(
            _compare,
            z_CV,
            teacher_CV,
            self._unit_CV,
            table_5C,
            z_CV.stride(0),
            V,
            C,
            beta,
            DIRECTION=endpoint(direction, beta),
            BLOCK=_block(V),
        )
        value_C, our_lse_C, lse_C, our_entropy_C, entropy_C = table_5C
        self._normalised = our_lse_C, our_entropy_C
        logq_CK = teacher_CV.gather(-1, ids_CK) - lse_C[:, None]
        return self._leaf(value_C, None), entropy_C, logq_CK

    def gradient(self, grads: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        leaf_grads = [(i, g) for i, g in zip(self._ids, grads, strict=True) if g is not None]
        weight_C = next((g for ids, g in leaf_grads if ids is None), None)
        picked = [(ids, g) for ids, g in leaf_grads if isinstance(ids, Tensor)]
        tails = [(self._tails[i], g) for i, g in leaf_grads if isinstance(i, int)]
        if not picked and not tails:
            assert self._unit_CV is not None, "the one leaf left is a divergence"
            return self._unit_CV, weight_C
        shares = [share_outside(self.logits_CV, *t).mul_(g[:, None]) for t, g in tails]
        picked_C = -sum([g.sum(-1) for _, g in picked] + [g for _, g in tails])
        z_CV = self.logits_CV
        _launch(
            _affine,
            z_CV,
            self._lse_and_entropy()[0],
            picked_C,
            picked_C if weight_C is None else weight_C.contiguous(),
            z_CV if weight_C is None or self._unit_CV is None else self._unit_CV,
            z_CV.stride(0),
            z_CV.shape[1],
            ADD=weight_C is not None,
            BLOCK=_block(z_CV.shape[1]),
        )
        for ids_CK, g_CK in picked:  # in fp32: near p = 1 the two cancel
            z_CV.scatter_add_(-1, ids_CK, g_CK)
        for share_CV in shares:
            z_CV += share_CV
        return z_CV, None

    def _leaf(self, value: Tensor, ids_CK: Tensor | int | None) -> Tensor:
        self.leaves.append(value.requires_grad_())
        self._ids.append(ids_CK)
        return value


def _launch(
    kernel: JITFunction,
    z_CV: Tensor,
    *arguments: Tensor | float,
    **fixed: int | str | bool,
) -> None:
    """Run a kernel, one program a row of logits.

    Args:
        fixed: what it is compiled for.
    """
    kernel[(len(z_CV),)](z_CV, *arguments, **fixed)


def _block(V: int) -> int:
    return min(BLOCK, triton.next_power_of_2(V))
