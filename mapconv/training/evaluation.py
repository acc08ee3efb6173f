"""Measure models on held-out data, in float32 with sums in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mapconv.data import Dataset, Objective
from mapconv.training.losses import CHUNK, divergence_terms
from mapconv.training.models import MAP, SOURCE, CalibrationModels
from mapconv.training.processes import Processes


@dataclass(frozen=True)
class ModelNumbers:
    """One model on the held-out data: mean KL(source ‖ model) in nats, agreement of the likeliest answer with the
    source's, and, where answers are known, the mean loss; its exponential is the perplexity of a language model."""

    kl: float
    top1_agreement: float
    loss: float | None
    perplexity: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Evaluator:
    """Held-out data, run in batches."""

    def __init__(
        self, models: CalibrationModels, data: Dataset, objective: Objective, batch_size: int, *, causal: bool
    ) -> None:
        self._models, self._data, self._objective, self._causal = models, data, objective, causal
        self._batches = [
            list(range(len(data)))[start : start + batch_size] for start in range(0, len(data), batch_size)
        ]

    @torch.no_grad()
    def objective(self, processes: Processes) -> float:
        """What training lowers, as a mean over positions: the KL to the source, or the data's own loss."""
        device = processes.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        by_label = self._objective == "task"
        for batch in processes.share(self._batches):
            inputs = self._data.batch(batch, device)
            targets, counts = self._models.targets(inputs, by_label=by_label)
            result = self._models.logits(MAP, inputs)[counts]
            source = None if by_label else self._models.logits(SOURCE, inputs)[counts]
            targets = targets[counts]
            for part in _parts(len(targets)):
                log_result = result[part].double().log_softmax(-1)
                if source is None:
                    losses = -log_result.gather(1, targets[part, None])
                else:
                    losses, _ = divergence_terms(source[part].double().log_softmax(-1), log_result)
                total[0] += losses.sum()
                total[1] += len(losses)
        processes.sum_([total])
        return float(total[0] / total[1])

    @torch.no_grad()
    def numbers(
        self, models: Mapping[str, Callable[[dict[str, torch.Tensor]], torch.Tensor]], device: torch.device
    ) -> tuple[dict[str, ModelNumbers], int]:
        """(numbers of each model by its name, positions). ``models`` are functions of a batch to logits."""
        sums = {name: _Sums() for name in models}
        for batch in self._batches:
            inputs = self._data.batch(batch, device)
            targets, counts = self._models.targets(inputs, by_label=False)
            known = self._models.targets(inputs, by_label=True)[1][counts]
            targets = targets[counts]
            source = self._models.logits(SOURCE, inputs)[counts]
            for name, model in models.items():
                logits = model(inputs)[counts]
                for part in _parts(len(targets)):
                    log_source = source[part].double().log_softmax(-1)
                    sums[name].add(log_source, logits[part].double().log_softmax(-1), targets[part], known[part])
        return {name: total.means(causal=self._causal) for name, total in sums.items()}, sums[
            next(iter(sums))
        ].positions


@dataclass
class _Sums:
    positions: int = 0
    known: int = 0
    kl: float = 0.0
    agreements: int = 0
    loss: float = 0.0

    def add(self, log_p: torch.Tensor, log_q: torch.Tensor, targets: torch.Tensor, known: torch.Tensor) -> None:
        self.positions += len(log_p)
        self.kl += float(divergence_terms(log_p, log_q)[0].sum())
        self.agreements += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        self.known += int(known.sum())
        self.loss -= float(log_q.gather(1, targets[:, None])[:, 0][known].sum())

    def means(self, *, causal: bool) -> ModelNumbers:
        loss = self.loss / self.known if self.known else None
        perplexity = _exponential(loss) if causal and loss is not None else None
        return ModelNumbers(self.kl / self.positions, self.agreements / self.positions, loss, perplexity)


def _exponential(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _parts(count: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]
