"""A language-model head as a linear map and its adjoint, on the valid vocabulary only.

Ids beyond the tokenizer's are cut off, not masked: no logit of theirs is ever made, so they have
probability zero and a gradient of zero on every side, and 0 x -inf does not arise. Logits are fp32
whatever the operands are (float64 for float64). On a GPU the matrix products read low-precision
operands and write fp32; on a CPU, which has no such product, the weights are widened a tile of the
vocabulary at a time. Leaves out LoRA heads and heads that are not one linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 8192  # vocabulary rows widened at once, where they have to be


@dataclass
class HeadGrad:
    """The gradient of a head's parameters in at least fp32; None for a frozen one."""

    weight_VD: Tensor | None
    bias_V: Tensor | None


@dataclass
class Head:
    """A head: hidden rows -> logits of the valid ids at a temperature.

    Attributes:
        weight_VD: its matrix; V may exceed ``valid_V``.
        valid_V: ids the tokenizer has.
        bias_V: its bias, if any.
        softcap: ``c tanh(z / c)`` on the logits (Gemma 2, arXiv 2408.00118), if any.
        temperature: divides the logits, after the softcap.
        rounded: round the logits to bfloat16, as most frameworks do; for comparison only.
        scale: multiplies the logits, before the softcap (Cohere; Granite, which divides).
    """

    weight_VD: Tensor
    valid_V: int
    bias_V: Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0
    rounded: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        assert self.valid_V <= len(self.weight_VD), "every valid id has a row"

    @property
    def logits_dtype(self) -> torch.dtype:
        """The type of logits and of gradients that are summed over chunks."""
        return torch.promote_types(self.weight_VD.dtype, torch.float32)

    @property
    def operand(self) -> torch.dtype:
        """The type in which a gradient of the logits enters its two products."""
        return self.weight_VD.dtype if self.weight_VD.is_cuda else self.logits_dtype

    def logits(self, hidden_CD: Tensor, out_CV: Tensor | None = None) -> Tensor:
        """Return logits [C, valid V] in at least fp32, into ``out_CV`` if given."""
        C = hidden_CD.shape[0]
        if out_CV is None:
            out_CV = torch.empty(C, self.valid_V, dtype=self.logits_dtype, device=hidden_CD.device)
        for part, weight_TD in self._tiles():
            _product(hidden_CD, weight_TD.T, out_CV[:, part])
        bias_V = None if self.bias_V is None else self.bias_V.detach()[: self.valid_V]
        return self._shape(out_CV, bias_V)

    def _shape(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """Apply bias, scale, softcap, temperature and rounding, in place."""
        if bias is not None:
            logits += bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            logits /= self.temperature
        if self.rounded:
            logits.copy_(logits.to(torch.bfloat16))
        return logits

    def at(self, hidden_CD: Tensor, ids_CK: Tensor) -> Tensor:
        """Return logits at some ids of each row, [C, K]: a product with those rows of the head."""
        weight_CKD = self.weight_VD.detach()[ids_CK].to(self.logits_dtype)
        logits_CK = torch.einsum("cd,ckd->ck", hidden_CD.to(self.logits_dtype), weight_CKD)
        return self._shape(logits_CK, None if self.bias_V is None else self.bias_V.detach()[ids_CK])

    def slope(self, logits_CV: Tensor) -> Tensor | None:
        """Return d logits / d (hidden x weight), where it is not the constant scale /
        temperature."""
        if not self.softcap:
            return None
        uncapped_CV = logits_CV * (self.temperature / self.softcap)
        slope_CV = (1 - uncapped_CV.square_()).div_(self.temperature)
        return slope_CV if self.scale == 1.0 else slope_CV.mul_(self.scale)

    def new_grad(self) -> HeadGrad:
        """Return zeros where a parameter is trained; a frozen head allocates nothing."""
        return HeadGrad(
            *(
                torch.zeros_like(p, dtype=self.logits_dtype)
                if p is not None and p.requires_grad
                else None
                for p in (self.weight_VD, self.bias_V)
            )
        )

    def adjoint(
        self,
        grad_CV: Tensor,
        factor_C: Tensor | None,
        slope_CV: Tensor | None,
        hidden_CD: Tensor,
        out_CD: Tensor,
        grad: HeadGrad,
    ) -> None:
        """Turn the gradient of the logits into that of the hidden rows (written) and head (added).

        Args:
            grad_CV: gradient of what ``logits`` returned; overwritten.
            factor_C: factor of its rows, if it is not in them: it scales rows of width D instead.
            slope_CV: what ``slope`` returned for it.
        """
        if slope_CV is not None:
            grad_CV *= slope_CV
        else:
            if self.temperature != 1.0:
                grad_CV /= self.temperature
            if self.scale != 1.0:
                grad_CV *= self.scale
        grad_CV = grad_CV.to(self.operand)
        scaled_CD = hidden_CD
        if factor_C is not None:
            scaled_CD = (hidden_CD * factor_C[:, None]).to(hidden_CD.dtype)
        if grad.bias_V is not None:
            ones_C = torch.ones_like(grad_CV[:, 0]) if factor_C is None else factor_C
            grad.bias_V[: self.valid_V] += grad_CV.T.to(self.logits_dtype) @ ones_C.to(
                self.logits_dtype
            )
        wide_CD = (
            out_CD
            if out_CD.dtype == self.logits_dtype
            else torch.empty_like(out_CD, dtype=self.logits_dtype)
        )
        for i, (part, weight_TD) in enumerate(self._tiles()):
            _product(grad_CV[:, part], weight_TD, wide_CD, add=i > 0)
            if grad.weight_VD is not None:
                _product(grad_CV[:, part].T, scaled_CD, grad.weight_VD[part], add=True)
        if factor_C is not None:
            wide_CD *= factor_C[:, None]
        if wide_CD is not out_CD:
            out_CD.copy_(wide_CD)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield parts of the valid vocabulary and their weights, in a type a product can read."""
        weight_VD = self.weight_VD.detach()
        if weight_VD.dtype == self.logits_dtype or weight_VD.is_cuda:
            yield slice(0, self.valid_V), weight_VD[: self.valid_V]
            return
        for start in range(0, self.valid_V, TILE):
            part = slice(start, min(start + TILE, self.valid_V))
            yield part, weight_VD[part].to(self.logits_dtype)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Set ``out = a b`` (plus ``out``), accumulated in the type of ``out``, at least fp32."""
    if a.is_cuda and a.dtype != out.dtype:
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif add:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
