"""Differentiable pieces of ``y = a·W0x + b·B(Ax)`` that save no more than LoRA does (``mapconv.algebra`` section 7).

Shapes: x (…, m), W0 (n, m), A (r, m), B (n, r); the gains a and b are 0-d, in float32 or wider. For a stack of E
weights A is (E, r, m), B is (E, n, r), and what is 0-d otherwise is (E,).
Double backward is refused: nothing here needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

#: BLAS counts the elements of a dot product in 32 bits.
_LONGEST_DOT = 2**31 - 1


def scaled(values: torch.Tensor, gain: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """values·gain, rounded once.

    A 0-d gain would first be rounded to the values' dtype on a GPU: in bfloat16 that moves a gain by up to 0.4 %.
    """
    if values.dtype.itemsize >= 4:
        return torch.mul(values, gain, out=out)
    out = torch.empty_like(values) if out is None else out
    return torch.mul(values, gain.reshape([1] * max(1, values.dim())), out=out)


def inner(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """⟨left, right⟩ as 0-d, accumulated in float32 or wider."""
    if left.dtype.itemsize >= 4 and left.numel() <= _LONGEST_DOT:
        return torch.dot(left.reshape(-1), right.reshape(-1))
    return (left * right).sum(dtype=torch.promote_types(left.dtype, torch.float32))


class MapLinear(Function):
    """a·W0x + b·B(Ax) + bias, with W0 and the bias frozen.

    Saved: x, Ax and the parameters, as LoRA does. ∂L/∂a = ⟨x, W0ᵀg⟩ comes from the input gradient of the base path,
    which is computed anyway, and ∂L/∂b = ⟨B, G⟩ with G = gᵀ(Ax), where ∂L/∂B = b·G. The gain b goes on B in B's own
    float32, before it is cast: a small B has a large gain, and either alone can leave the range of float16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        A: torch.Tensor,
        B: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """``weight`` is (n, m), of any strides; ``dtype`` is the one to compute in (autocast's, or x's own)."""
        narrow = x.to(dtype)
        projected = linear(narrow, A.to(dtype))
        # The gain goes on the narrower side, in one pass; a bias is not scaled, so with one it goes on x.
        if bias is None and B.shape[0] <= A.shape[1]:
            y = linear(narrow, weight.to(dtype))
            y = scaled(y, a, out=y)
        else:
            y = linear(scaled(narrow, a), weight.to(dtype), None if bias is None else bias.to(dtype))
        y.view(-1, B.shape[0]).addmm_(projected.view(-1, A.shape[0]), (B * b).to(dtype).t())
        ctx.save_for_backward(x, weight, A, B, projected, a, b)
        ctx.dtype = dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, A, B, projected, a, b = ctx.saved_tensors
        dtype = ctx.dtype
        for_x, _, _, for_A, for_B, for_a, for_b, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = grad_a = grad_b = None
        g = grad.to(dtype).reshape(-1, B.shape[0])
        flat = projected.view(-1, A.shape[0])
        if for_B or for_b:
            met = (g.t() @ flat).to(B.dtype)
            grad_b = inner(B, met).to(b.dtype) if for_b else None
            grad_B = met.mul_(b) if for_B else None
        if for_x or for_A:
            back = g @ (B * b).to(dtype)
        if for_x or for_A or for_a:
            narrow = x.to(dtype).reshape(-1, A.shape[1])
        if for_A:
            grad_A = (back.t() @ narrow).to(A.dtype)
        if for_x or for_a:
            grad_x = g @ weight.to(dtype)
            if for_a:
                grad_a = inner(narrow, grad_x).to(a.dtype)
            if for_x:
                grad_x = scaled(grad_x, a, out=grad_x).addmm_(back, A.to(dtype)).view(x.shape).to(x.dtype)
        return grad_x if for_x else None, None, None, grad_A, grad_B, grad_a, grad_b, None


class Scale(Function):
    """values·gain, rounded once; saves the values only for the gain's gradient."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values if ctx.needs_input_grad[1] else None, gain)
        return scaled(values, gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, gain = ctx.saved_tensors
        for_values, for_gain = ctx.needs_input_grad
        grad_gain = inner(values, grad.to(values.dtype)).to(gain.dtype) if for_gain else None
        return scaled(grad, gain) if for_values else None, grad_gain


#: Below this share of the terms' own size their sum ‖BA‖² is formed in float64. Each term is off by a few 6e-8 of its
#: size in float32, so that a norm is off by at most a few 3e-7 where they cancel less.
CANCELLING = 0.1


def inverse_norm(
    A: torch.Tensor, B: torch.Tensor, dtype: torch.dtype = torch.float64, floor: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """1/max(‖BA‖, floor) as 0-d float64 (0 where both are 0: there is no direction), and BᵀB and AAᵀ.

    The two matrices are in ``dtype``, or in float64 where the columns of BA cancel.
    """
    wide_A, wide_B = A.to(dtype), B.to(dtype)
    left, right = wide_B.mT @ wide_B, wide_A @ wide_A.mT
    terms = left.double() * right.double()
    square = terms.sum((-2, -1))
    if dtype is not torch.float64 and not (square >= CANCELLING * terms.abs().sum((-2, -1))).all():
        return inverse_norm(A, B, torch.float64, floor)
    inverse = torch.where(square > 0, square.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    if floor:
        inverse = torch.where(square > floor**2, inverse, 1 / floor)
    return inverse, left, right


class UpdateGain(Function):
    """b = beta·unit/max(‖BA‖, floor) as 0-d, where beta (1,) is held in units of ``unit``, a number (or E of them).

    The gradient of 1/‖BA‖ is −‖BA‖⁻³·(BᵀB·A) for A and −‖BA‖⁻³·(B·AAᵀ) for B, and 0 where the floor stands for
    the norm. One function for the whole chain: a small layer's step would feel the nodes of a longer graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        beta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        unit: float | torch.Tensor,
        dtype: torch.dtype,
        floor: float,
    ) -> torch.Tensor:
        ctx.unit, ctx.floor = unit, floor
        inverse, left, right = inverse_norm(A, B, dtype, floor)
        ctx.save_for_backward(beta, A, B, left, right, inverse)
        return (beta.reshape(inverse.shape) * (unit * inverse)).to(beta.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for_beta, for_A, for_B, _, _, _ = ctx.needs_input_grad
        beta, A, B, left, right, inverse = ctx.saved_tensors
        slope = grad * (ctx.unit * inverse)
        grad_A = grad_B = None
        if for_A or for_B:
            factor = (slope * beta.reshape(inverse.shape) * inverse**2).neg().to(left.dtype)
            if ctx.floor:
                factor = torch.where(inverse < 1 / ctx.floor, factor, 0.0)
            factor = factor[..., None, None]
            grad_A = ((factor * left) @ A.to(left.dtype)).to(A.dtype) if for_A else None
            grad_B = (B.to(left.dtype) @ (factor * right)).to(B.dtype) if for_B else None
        return slope.to(beta.dtype).reshape(beta.shape) if for_beta else None, grad_A, grad_B, None, None, None


def gram_dtype(A: torch.Tensor) -> torch.dtype:
    """What a norm in training is formed in: the factors' own float32 on a CPU, where float64 takes twice as long.

    On a GPU float32 may mean TF32, and under autocast a product of float32 is one of bfloat16: neither touches float64.
    """
    kind = A.device.type
    if kind != "cpu" or torch.is_autocast_enabled(kind) or torch.compiler.is_compiling():
        return torch.float64  # a graph cannot look at the norm to see whether it cancels
    return A.dtype
