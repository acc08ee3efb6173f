"""A linear layer's step with MAP on a CPU, whole in one function: LoRA's products, and a few numbers more.

Between the products of a small layer every tensor operation counts: the gains are Python's numbers here, which a matrix
product takes in as its own factors. A GPU would wait for them: there ``functions.MapLinear`` has them as tensors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from mapconv.nn.functions import CANCELLING, inner, inverse_norm


class TrainedLinear(Function):
    """a·W0x + b·B(Ax) + bias; a = alpha·share, b = beta·unit/max(‖BA‖, floor). W0 and the bias are frozen.

    Shapes: x (…, m), W0 (n, m), A (r, m), B (n, r), alpha and beta (1,), all of one dtype. Saved: x, Ax, the parameters
    and two (r, r). With G = gᵀ(Ax), ∂L/∂b = ⟨B, G⟩; the norm's part of the factors' gradients is −c·BᵀB·A and −c·B·AAᵀ
    with c = b·∂L/∂b/‖BA‖², or 0 where the floor stands for the norm, and where it is ``detached``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor,
        alpha: torch.Tensor,
        beta: torch.Tensor,
        share: float,
        unit: float,
        floor: float,
        detached: bool,
    ) -> torch.Tensor:
        a = float(alpha) * share
        inverse, left, right = _inverse_norm(A, B, floor)
        b = float(beta) * unit * inverse
        projected = linear(x, A).view(-1, A.shape[0])
        if bias is None:
            y, kept = linear(x, weight), a
        else:
            y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.t(), alpha=a).view(*x.shape[:-1], B.shape[0])
            kept = 1.0
        y.view(-1, B.shape[0]).addmm_(projected, B.t(), beta=kept, alpha=b)
        ctx.save_for_backward(x, weight, A, B, projected, beta, left, right)
        counts = inverse and not detached and not (floor and inverse >= 1 / floor)
        ctx.numbers = a, share, b, unit * inverse, -b * inverse**2 if counts else 0.0
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, A, B, projected, beta, left, right = ctx.saved_tensors
        a, share, b, slope, turn = ctx.numbers
        for_x, _, _, for_A, for_B, for_alpha, for_beta, *_ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = grad_alpha = grad_beta = None
        g, flat = grad.reshape(-1, B.shape[0]), x.reshape(-1, x.shape[-1])
        met = g.t() @ projected
        grad_b = float(inner(B, met))
        if for_B:
            grad_B = torch.addmm(met, B, right, beta=b, alpha=grad_b * turn)
        if for_beta:
            grad_beta = beta.new_full((1,), grad_b * slope)
        if for_x or for_A:
            back = g @ B
        if for_A:
            grad_A = (left @ A).addmm_(back.t(), flat, beta=grad_b * turn, alpha=b)
        if for_x or for_alpha:
            grad_x = g @ weight
            if for_alpha:
                grad_alpha = inner(flat, grad_x).reshape(1)
                if share != 1.0:
                    grad_alpha.mul_(share)
            grad_x = grad_x.addmm_(back, A, beta=a, alpha=b).view(x.shape) if for_x else None
        return grad_x, None, None, grad_A, grad_B, grad_alpha, grad_beta, *[None] * 4


def _inverse_norm(A: torch.Tensor, B: torch.Tensor, floor: float) -> tuple[float, torch.Tensor, torch.Tensor]:
    """``functions.inverse_norm`` with a number in the place of the tensor, in a third of its operations."""
    left, right = B.t() @ B, A @ A.t()
    terms = left.double() * right
    square = float(terms.sum())
    if not square >= CANCELLING * float(terms.abs_().sum()):
        inverse, left, right = inverse_norm(A, B, torch.float64, floor)
        return float(inverse), left.to(A.dtype), right.to(A.dtype)
    inverse = 1 / math.sqrt(max(square, torch.finfo(torch.float64).tiny)) if square else 0.0
    return (1 / floor if floor and not square > floor**2 else inverse), left, right
