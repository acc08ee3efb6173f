"""How far a model's distributions are from a source's, summed over positions: the divergence, agreement, loss.

A position is a predicted token, or one text for a classifier. Distributions are compared in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from mapconv.algebra.norms import row_blocks

#: Positions of a loss at once: 64 × 256,000 tokens take 131 MB in float64, a handful of such tensors at a time.
CHUNK = 64
#: Logits compared at once: small enough to stay in a cache.
COMPARED = 1 << 19
#: In nats. The short form is off by up to about 1e-14 at a position: beside this, by a millionth.
_APART = 1e-8


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
        source: _Logits,
        model: _Logits,
        targets: torch.Tensor | None,
        known: torch.Tensor | None,
    ) -> None:
        """A block of positions."""
        self.positions += len(model.values)
        if model is source:
            self.agreements += len(model.values)  # of itself it is no step away
        else:
            kl = source.divergences(model)
            self.kl += float(kl.sum())
            self.kl_largest = max(self.kl_largest, float(kl.max()))
            self.agreements += int((source.likeliest == model.likeliest).sum())
            self.difference = max(self.difference, float((source.values - model.values).abs().max()))
        if targets is not None:
            losses = -model.log_probabilities(targets)
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
    for start, stop in row_blocks(source.shape[0], source.shape[1], COMPARED):
        wanted = _Logits(source[start:stop])
        chosen = [None if each is None else each[start:stop] for each in (targets, known)]
        for total, model in zip(sums, models, strict=True):
            total._count(wanted, wanted if model is source else _Logits(model[start:stop]), *chosen)


class _Logits:
    """Logits (positions, classes) of a model, and what is known of their distributions, in float64."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        wide = values.double()
        # Below the largest, so that sums of products with probabilities keep their digits.
        self._below = wide.sub_(wide.amax(-1, keepdim=True))
        self._exponentials = self._below.exp()
        self._sums = self._exponentials.sum(-1)
        self._norms = self._sums.log()

    @cached_property
    def likeliest(self) -> torch.Tensor:
        return self.values.argmax(-1)

    @cached_property
    def _probabilities(self) -> torch.Tensor:
        return self._exponentials / self._sums[:, None]

    @cached_property
    def _entropies(self) -> torch.Tensor:
        """−Σ p·log p of each row."""
        return self._norms - _dots(self._probabilities, self._below)

    def log_probabilities(self, targets: torch.Tensor) -> torch.Tensor:
        """log p of one class a row."""
        return self._below.gather(1, targets[:, None])[:, 0] - self._norms

    def divergences(self, model: _Logits) -> torch.Tensor:
        """KL(p ‖ q) of each row, for q of a model: Σ p·log p − Σ p·log q, which float64 keeps to about 1e-14.

        Where no row is far enough apart for that, such as of an exact conversion, in the form that cancels nothing.
        """
        kl = model._norms - _dots(self._probabilities, model._below) - self._entropies
        if bool(torch.isfinite(kl).all()) and float(kl.amax()) > _APART:
            return kl.clamp_(min=0)
        log_p, log_q = (each._below - each._norms[:, None] for each in (self, model))
        return divergence_terms(log_p, log_q)[0]


def _dots(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """⟨one, two⟩ of each row."""
    return torch.bmm(one[:, None, :], two[:, :, None])[:, 0, 0]


def _exponential(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
