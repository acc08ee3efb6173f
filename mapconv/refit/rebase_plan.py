"""The plan of a rebase in numbers, for ``--dry-run``: from names, shapes, options, and the length of the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mapconv.checkpoint.index import Checkpoint
from mapconv.placement.adapters import PlacedAdapter
from mapconv.refit.plan import IMPORTS, IMPORTS_WITH_MODEL, operations_a_second
from mapconv.refit.rebase import MEMORY, RebaseOptions, refit_bytes
from mapconv.runtime.cores import core_count
from mapconv.runtime.sampling import TOGETHER
from mapconv.runtime.threads import workers_for

#: What the layers' inputs are known from; ``weights``: from nothing.
Source = Literal["data", "samples", "statistics", "weights"]
#: Products with a thin block that a solve takes, and columns of it beside the rank.
_PRODUCTS, _MORE_COLUMNS = 10, 8
#: Passes of a training step in forward passes: the source's, the result's, and its gradients.
_PASSES_A_STEP = 4
#: Sequences of a training step, and bytes of weights that a model which writes text moves in a second.
_BATCH, _MOVED = 4, 8e9


@dataclass(frozen=True)
class RebasePlan:
    """What a rebase would do, and roughly what it takes.

    ``added`` of the ``modules`` are linear layers that the source leaves alone; ``whole`` tensors are copied.
    ``ranks`` are those asked for; with ``spread`` the one number is their mean, with ``tolerance`` they are the
    source's. The layers' inputs are known ``by`` ``sequences`` of ``tokens`` in all: the user's, the source's own, or
    stored ones. ``models`` run for that at the same time; ``steps`` of training follow. ``seconds`` and ``memory``
    (bytes) are rough.
    """

    modules: int
    added: int
    whole: int
    ranks: tuple[int, ...]
    spread: bool
    tolerance: float | None
    by: Source
    sequences: int
    tokens: int
    models: int
    steps: int
    nbytes: int
    seconds: float
    memory: int

    def to_dict(self) -> dict[str, Any]:
        return vars(self).copy()


@dataclass(frozen=True)
class PlannedText:
    """Sequences that a rebase looks at, of ``tokens`` in all, and ``measured`` tokens of others at its end."""

    by: Source
    sequences: int
    tokens: int
    measured: int


def plan_rebase(
    trained: PlacedAdapter,
    served: PlacedAdapter,
    options: RebaseOptions,
    text: PlannedText,
    *,
    spread: bool,
    models: int,
    steps: int,
) -> RebasePlan:
    """The plan in numbers; reads no weight.

    Args:
        trained, served: the adapter on the base that it was trained on, and on the other.
        options: of the refits; with ``spread``, ``rank`` is the mean.
        text: what the layers' inputs are known from.
        models: those that run for the refit: 2 in lockstep, 1 for the source's inputs alone, or 0.
        steps: of the training afterwards.
    """
    wanted = [options.wanted(item) for item in served.modules]
    return RebasePlan(
        modules=len(served.modules),
        added=sum(not item.module.has_factors for item in served.modules),
        whole=len(served.adapter.others),
        ranks=(options.rank,) if spread and options.rank else tuple(sorted({each.rank for each in wanted})),
        spread=spread,
        tolerance=options.tolerance,
        by=text.by,
        sequences=text.sequences,
        tokens=text.tokens,
        models=models,
        steps=steps,
        nbytes=options.stored_bytes(served),
        seconds=_seconds(trained, served, options, text, models, steps),
        memory=_memory(trained, served, options, text, models, steps),
    )


def _seconds(
    trained: PlacedAdapter, served: PlacedAdapter, options: RebaseOptions, text: PlannedText, models: int, steps: int
) -> float:
    """From counted operations, and the speed of thin and of square products on this machine, right now."""
    cores, known = core_count(), text.by != "weights"
    thin, square = 0.0, 0.0
    for item in served.modules:
        (_, width), wanted = item.weight.shape, options.wanted(item)
        thin += 2 * item.weight.numel * _PRODUCTS * (wanted.rank + _MORE_COLUMNS)
        square += (1 + models) * item.weight.numel * width if known else 0.0
        if models:
            # Inputs are mostly shared by two or three layers.
            square += (2 * models - 1) * text.tokens * width**2 / 2
    whole = _elements(trained.target.checkpoint)
    if models:
        square += 2 * models * text.tokens * sum(item.weight.numel for item in served.modules)
    square += 2 * whole * (4 * text.measured + steps * _PASSES_A_STEP * _BATCH * (text.tokens / (text.sequences or 1)))
    seconds = thin / operations_a_second() / cores + square / operations_a_second(1024) / cores
    if text.by == "samples":
        # A step widens every weight: it is read in 16 bits, and written and read in 32.
        steps_written = text.tokens / text.sequences * -(-text.sequences // TOGETHER)
        seconds += steps_written * whole * 10 / _MOVED + 2 * text.tokens * whole / operations_a_second() / cores
    return seconds


def _memory(
    trained: PlacedAdapter, served: PlacedAdapter, options: RebaseOptions, text: PlannedText, models: int, steps: int
) -> int:
    sizes = list(refit_bytes(served.modules, options).values())
    largest = max(sizes)
    bases = trained.target.checkpoint, served.target.checkpoint
    if steps:
        return IMPORTS_WITH_MODEL + sum(4 * _elements(base) for base in bases)
    if not models and not text.measured:
        together = sum(sorted(sizes)[-workers_for(sizes, MEMORY) :])
        return IMPORTS + max(largest, min(together, MEMORY))
    # Each pass waits with what it carries from layer to layer, and with the widest layer's inputs and outputs.
    carried = 4 * text.tokens * max(sum(item.weight.shape) for item in served.modules)
    run = bases if text.measured or models == 2 else bases[:1]
    stored = sum(ref.nbytes for base in run for ref in base.tensors.values())
    return IMPORTS_WITH_MODEL + largest + stored + models * 2 * carried


def _elements(checkpoint: Checkpoint) -> int:
    return sum(ref.numel for ref in checkpoint.tensors.values())
