"""The training loop: Adam on the scalars, or on all of a MAP adapter, with the best held-out state kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mapconv.data import Dataset, Objective
from mapconv.runtime.progress import StepBar
from mapconv.training.evaluation import Evaluator
from mapconv.training.losses import cross_entropy, divergence
from mapconv.training.models import MAP, SOURCE, CalibrationModels, Train
from mapconv.training.processes import Processes

#: Adam's own 1e-8 is as large as the gradients of a KL of 1e-5, and would stop it.
ADAM_EPSILON = 1e-15
#: Below this mean KL, in nats, two functions differ by the rounding of a float32 forward pass.
EXACT = 1e-8
#: A held-out objective of so many times the start's ends the run.
DIVERGED = 10.0


@dataclass(frozen=True)
class Recipe:
    """What decides a run's result, besides the models and the data."""

    objective: Objective
    train: Train
    steps: int
    learning_rate: float
    batch_size: int
    sequence_length: int
    seed: int
    hold_gain: bool = False

    @property
    def warmup(self) -> int:
        return min(20, max(1, self.steps // 10))

    @property
    def evaluate_every(self) -> int:
        """Five times in a short run, every fifty steps in a long one."""
        return max(1, min(50, self.steps // 5))

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, …: a linear warmup, then half a cosine down to nothing."""
        warm = min(1.0, (step + 1) / self.warmup)
        return self.learning_rate * warm * (1 + math.cos(math.pi * step / self.steps)) / 2

    def batch(self, step: int, sequences: int) -> list[int]:
        """The sequences of a step. Each pass over the data has an order of its own, a function of seed and pass."""
        wanted = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders: dict[int, list[int]] = {}
        for position in wanted:
            number = position // sequences
            if number not in orders:
                generator = torch.Generator().manual_seed((self.seed << 20) + number)
                orders[number] = torch.randperm(sequences, generator=generator).tolist()
        return [orders[position // sequences][position % sequences] for position in wanted]


@dataclass
class Progress:
    """Where a run is: all that it needs to go on, besides the recipe, the models and the data."""

    step: int = 0
    tokens: int = 0
    #: (steps done, trained parameters) of the best held-out objective.
    best: tuple[int, list[torch.Tensor]] = field(default=(0, []))
    #: (steps done, held-out objective), the closed form first.
    history: list[tuple[int, float]] = field(default_factory=list)
    #: (steps done, median of |β|/‖W0‖ over the weights) at the same steps: how far the weights have moved.
    sizes: list[tuple[int, float]] = field(default_factory=list)
    #: Why the run ended before its last step.
    stopped: str | None = None
    interrupted: bool = False

    @property
    def best_step(self) -> int:
        return self.best[0]

    @property
    def best_objective(self) -> float:
        return dict(self.history)[self.best_step]


class Trainer:
    """One run. After ``run`` the model has its best state."""

    def __init__(
        self, recipe: Recipe, models: CalibrationModels, data: Dataset, evaluator: Evaluator, processes: Processes
    ) -> None:
        self.recipe, self.progress = recipe, Progress()
        self._models, self._data, self._evaluator, self._processes = models, data, evaluator, processes
        groups = [
            {"params": [parameter], "size": size} for parameter, size in zip(models.trained, models.sizes, strict=True)
        ]
        self._optimizer = torch.optim.Adam(groups, lr=0.0, eps=ADAM_EPSILON)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "progress": vars(self.progress),
            "parameters": [parameter.detach() for parameter in self._models.trained],
            "optimizer": self._optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._put(state["parameters"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def run(self, bar: StepBar, after_step: Callable[[], None]) -> Progress:
        """Train to the last step, to a loss that is not finite, or to Ctrl-C.

        ``after_step`` is called when a step is whole; it may store ``state()``.
        """
        progress = self.progress
        try:
            if not progress.history:
                self._evaluate(bar)
            while progress.step < self.recipe.steps and progress.stopped is None:
                self._step(bar)
                if progress.stopped is None:
                    after_step()
        except KeyboardInterrupt:
            if not progress.history:
                raise
            progress.interrupted = True
            progress.stopped = f"interrupted after step {progress.step} of {self.recipe.steps}"
        self._put(progress.best[1])
        return progress

    def _step(self, bar: StepBar) -> None:
        progress, started = self.progress, time.perf_counter()
        loss, tokens = self._gradient(progress.step)
        if not math.isfinite(loss):
            progress.stopped = f"the loss of step {progress.step + 1} is {loss}: a smaller --lr may help"
            return
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.rate(progress.step) * group["size"]
        self._optimizer.step()
        progress.step += 1
        progress.tokens += tokens
        bar.advance(train=loss, rate=tokens / (time.perf_counter() - started))
        if progress.step % self.recipe.evaluate_every == 0 or progress.step == self.recipe.steps:
            self._evaluate(bar)

    def _gradient(self, step: int) -> tuple[float, int]:
        """Set the gradients of the step's mean loss; returns (that loss, tokens read)."""
        everything = self.recipe.batch(step, len(self._data))
        own, device = self._processes.share(everything), self._processes.device
        by_label = self.recipe.objective == "task"
        positions = int(self._models.targets(self._data.batch(everything), by_label=by_label)[1].sum())
        self._optimizer.zero_grad(set_to_none=False)
        for parameter in self._models.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        total = torch.zeros((), device=device)
        if own:
            batch = self._data.batch(own, device)
            targets, counts = self._models.targets(batch, by_label=by_label)
            weights = counts / max(1, positions)
            with self._models.autocast(self.recipe.objective):
                loss = self._loss(batch, targets, weights)
            loss.backward()
            total += loss.detach()
        # Every parameter has a gradient: those that had none were given zeros above.
        gradients = [parameter.grad for parameter in self._models.trained if parameter.grad is not None]
        self._processes.sum_([total, *gradients])
        return float(total), int(self._data.attention_mask[everything].sum())

    def _loss(self, batch: dict[str, torch.Tensor], targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.recipe.objective == "task":
            return cross_entropy(self._models.logits(MAP, batch), targets, weights)
        with torch.no_grad():
            source = self._models.logits(SOURCE, batch)
        return divergence(self._models.logits(MAP, batch), source, weights)

    def _evaluate(self, bar: StepBar) -> None:
        progress = self.progress
        value = self._evaluator.objective(self._processes)
        bar.show(held_out=value)
        start = progress.history[0][1] if progress.history else value
        is_best = not progress.history or value < progress.best_objective
        progress.history.append((progress.step, value))
        size = self._models.update_size()
        if size is not None:
            progress.sizes.append((progress.step, size))
        if is_best:
            # One assignment: Ctrl-C before it leaves the older best whole.
            progress.best = progress.step, [parameter.detach().clone() for parameter in self._models.trained]
        if self.recipe.objective == "distill" and start <= EXACT:
            progress.stopped = f"the closed form is the source already (KL {start:.1e}): there is nothing to train"
        elif not value <= DIVERGED * start:
            went = f"went from {start:.3g} to {value:.3g} by step {progress.step}"
            progress.stopped = f"the held-out loss {went}: a smaller --lr may help"

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._models.trained, values, strict=True):
            parameter.copy_(value)
