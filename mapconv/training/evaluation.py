"""Measure models on held-out data, in float32 with sums in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mapconv.data import Dataset, Objective
from mapconv.fidelity.metrics import ModelNumbers, Sums, chunks, divergence_terms
from mapconv.training.models import MAP, SOURCE, CalibrationModels
from mapconv.training.processes import Processes


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
            for part in chunks(len(targets)):
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
        self, models: Mapping[str, Callable[[dict[str, torch.Tensor]], torch.Tensor] | None], device: torch.device
    ) -> tuple[dict[str, ModelNumbers], int]:
        """(numbers of each model by its name, positions). ``models`` are functions of a batch to logits, None for the
        source's.
        """
        sums = {name: Sums() for name in models}
        for batch in self._batches:
            inputs = self._data.batch(batch, device)
            targets, counts = self._models.targets(inputs, by_label=False)
            known = self._models.targets(inputs, by_label=True)[1][counts]
            targets = targets[counts]
            source = self._models.logits(SOURCE, inputs)[counts]
            for name, model in models.items():
                logits = source if model is None else model(inputs)[counts]
                sums[name].add(source, logits, targets, known)
        return {name: total.means(causal=self._causal) for name, total in sums.items()}, sums[
            next(iter(sums))
        ].positions
