"""How far a model's distributions are from a source's, summed over positions: the divergence, agreement, loss.

A position is a predicted token, or one text for a classifier. Distributions are compared in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

#: Positions computed at once: 64 × 256,000 tokens take 131 MB in float64, a handful of such tensors at a time.
CHUNK = 64


def divergence_terms(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(p ‖ q) of each row, q − p) without cancellation where the two are close.

    Σ q = Σ p, so KL = Σ p·(d + e^{−d} − 1) with d = log p − log q: every term is non-negative and of second order,
    whereas the terms of Σ p·d are of first order and cancel, which in float32 hides a KL below 1e-6.
    """
    p, difference = log_p.exp(), log_p - log_q
    near = difference.abs() < 1
    close = torch.where(near, difference, 0.0)
    growth = torch.expm1(-close)
    change = torch.where(near, p * growth, log_q.exp() - p)
    # p = 0 makes no first-order part, however far its logarithm is.
    far = change + torch.where(p > 0, p * difference, 0.0)
    return torch.where(near, p * (growth + close), far).sum(-1), change


def chunks(count: int) -> Iterator[slice]:
    """Slices of at most ``CHUNK`` positions."""
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


@dataclass(frozen=True)
class ModelNumbers:
    """One model on some data: mean KL(source ‖ model) in nats, agreement of the likeliest answer with the source's,
    and, where answers are known, the mean loss; its exponential is the perplexity of a language model."""

    kl: float
    top1_agreement: float
    loss: float | None
    perplexity: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Sums:
    """What was counted of one model against the source; ``kl_largest`` and ``difference`` are maxima."""

    positions: int = 0
    known: int = 0
    kl: float = 0.0
    kl_largest: float = 0.0
    agreements: int = 0
    difference: float = 0.0
    loss: float = 0.0

    def add(
        self,
        source: torch.Tensor,
        model: torch.Tensor,
        targets: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
    ) -> None:
        """Count logits (positions, classes) of both.

        Args:
            source: of the source.
            model: of the model.
            targets: (positions,) known answers, or None.
            known: (positions,) which of them count; None: all.
        """
        add_all([self], source, [model], targets, known)

    def _count(
        self,
        source: torch.Tensor,
        log_p: torch.Tensor,
        model: torch.Tensor,
        targets: torch.Tensor | None,
        known: torch.Tensor | None,
    ) -> None:
        """A chunk of positions, with log p of the source."""
        log_q = log_p if model is source else model.double().log_softmax(-1)
        self.positions += len(log_q)
        if model is source:
            self.agreements += len(log_q)  # of itself it is no step away
        else:
            kl = _divergences(log_p, log_q)
            self.kl += float(kl.sum())
            self.kl_largest = max(self.kl_largest, float(kl.max()))
            self.agreements += int((source.argmax(-1) == model.argmax(-1)).sum())
            self.difference = max(self.difference, float((source - model).abs().max()))
        if targets is not None:
            losses = -log_q.gather(1, targets[:, None])[:, 0]
            losses = losses if known is None else losses[known]
            self.known += len(losses)
            self.loss += float(losses.sum())

    def means(self, *, causal: bool) -> ModelNumbers:
        """As means over positions; a perplexity where the model is a ``causal`` language model."""
        loss = self.loss / self.known if self.known else None
        perplexity = _exponential(loss) if causal and loss is not None else None
        return ModelNumbers(self.kl / self.positions, self.agreements / self.positions, loss, perplexity)


def add_all(
    sums: Sequence[Sums],
    source: torch.Tensor,
    models: Sequence[torch.Tensor],
    targets: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
) -> None:
    """Count logits (positions, classes) of several models in one pass over the source's, as ``Sums.add`` does each."""
    for part in chunks(len(source)):
        wanted = source[part]
        log_p = wanted.double().log_softmax(-1)
        chosen = [None if each is None else each[part] for each in (targets, known)]
        for total, model in zip(sums, models, strict=True):
            total._count(wanted, log_p, wanted if model is source else model[part], *chosen)


def _divergences(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of each row of float64, as ``divergence_terms`` has it; but for extremes in fewer steps."""
    difference = log_p - log_q
    least, most = difference.aminmax()
    # Within these e^{−d} neither overflows nor meets a p of zero that would hide a q of any size.
    if least > -60 and most < math.inf:
        return difference.neg().expm1_().add_(difference).mul_(log_p.exp()).sum(-1)
    return divergence_terms(log_p, log_q)[0]


def _exponential(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
