"""Losses over a vocabulary, a few positions at a time, with gradients in closed form.

Of the (positions × vocabulary) tensors only two exist at once: the model's logits, and one buffer of their dtype that
holds the source's logits before and the gradient after. Everything in float32 or wider lives for a chunk alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import nll_loss

from mapconv.fidelity.metrics import chunks, divergence_terms


def divergence(logits: torch.Tensor, source: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ_i w_i·KL(source_i ‖ model_i) in nats, differentiable in ``logits``.

    Args:
        logits: (positions, vocabulary), any floating dtype.
        source: the same shape and dtype, without a gradient. Its memory is used for the gradient: it is overwritten.
        weights: (positions,).
    """
    return _Divergence.apply(logits, source, weights)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """−Σ_i w_i·log p_i(target_i), differentiable in ``logits``; targets are (positions,), in range even where w = 0."""
    return _CrossEntropy.apply(logits, targets, weights)


class _Divergence(Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, source: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights, total = weights.to(wide), torch.zeros((), dtype=torch.float64, device=logits.device)
        for part in chunks(len(logits)):
            log_p, log_q = source[part].to(wide).log_softmax(-1), logits[part].to(wide).log_softmax(-1)
            losses, change = divergence_terms(log_p, log_q)
            total += (losses * weights[part]).sum()
            source[part] = change * weights[part, None]
        ctx.save_for_backward(source)
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.saved_tensors[0] * gradient, None, None


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights, total = weights.to(wide), torch.zeros((), dtype=torch.float64, device=logits.device)
        change = torch.empty_like(logits)
        for part in chunks(len(logits)):
            log_q = logits[part].to(wide).log_softmax(-1)
            total += (nll_loss(log_q, targets[part], reduction="none") * weights[part]).sum()
            probabilities = log_q.exp_()
            probabilities[torch.arange(len(probabilities)), targets[part]] -= 1
            change[part] = probabilities * weights[part, None]
        ctx.save_for_backward(change)
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.saved_tensors[0] * gradient, None, None
