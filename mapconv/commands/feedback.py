"""A merge's jobs in the order in which the model's blocks show what their layers are fed with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapconv.checkpoint.reader import TORCH_DTYPES
from mapconv.errors import UnsupportedError
from mapconv.merging.plan import MergeJob, MergePlan
from mapconv.merging.rounding import Feedback
from mapconv.merging.writer import Group
from mapconv.placement.adapters import PlacedAdapter
from mapconv.refit.activations import input_roots
from mapconv.refit.writer import read_data
from mapconv.runtime.devices import resolve_device
from mapconv.wording import counted


@dataclass(frozen=True)
class FeedbackRun:
    """The passes over the data, and what is to be said and recorded of it.

    ``notes`` is complete once a merge has gone through ``groups``: only then is it known what no input reached.
    """

    groups: Callable[[MergePlan], Iterator[Group]]
    notes: list[str]
    record: dict[str, Any]


def feedback_run(
    plan: MergePlan, placed: PlacedAdapter, data: Path, *, samples: int, length: int, quiet: bool
) -> FeedbackRun:
    """Read the data; the model itself is loaded when the first group is asked for.

    Raises:
        DataError: no data, or none that the model can read. UnsupportedError: nothing of the merge is rounded,
        or the base cannot be run on text.
    """
    merged = [job for job in plan.jobs if isinstance(job, MergeJob)]
    if not any(job.codes or TORCH_DTYPES[job.target.dtype].itemsize <= 2 for job in merged):
        raise UnsupportedError(
            f"{plan.target.folder}: the merged weights are written in 32 bits, so --rounding feedback has nothing to "
            "do: leave it out, or choose a --dtype of 16 bits."
        )
    if plan.target.checkpoint.is_file or plan.target.checkpoint.models:
        raise UnsupportedError(
            f"{plan.target.folder} is not a model that reads text, so nothing is known of its layers' inputs: leave "
            "out --rounding feedback."
        )
    sample = read_data(data, placed.target, samples=samples, length=length)
    notes, found = list(sample.sequences.notes), len(sample.sequences)
    if found < samples:
        notes.append(
            f"--data gives {counted(found, 'sequence')} beside those held out, fewer than the {samples} to run"
        )

    def groups(plan: MergePlan) -> Iterator[Group]:
        waiting = {id(job): job for job in plan.jobs if isinstance(job, MergeJob)}
        yield [job for job in plan.jobs if not isinstance(job, MergeJob)], None
        device = resolve_device("auto")
        unseen: list[str] = []
        for modules, roots in input_roots(placed, sample.sequences, statistics="full", device=device, quiet=quiet):
            jobs, feedback = _of_modules(waiting, [item.module.path for item in modules]), Feedback(roots)
            unseen += [job.target.name for job in jobs if not feedback.covers(job)]
            yield jobs, feedback
        unseen += [job.target.name for job in waiting.values()]
        yield list(waiting.values()), None
        if unseen and (note := _unseen(unseen)) not in notes:
            notes.append(note)

    return FeedbackRun(groups, notes, sample.record)


def _unseen(names: Sequence[str]) -> str:
    return (
        f"{counted(len(names), 'merged tensor')} (first: {names[0]}) had no inputs to weigh errors by, as embeddings, "
        "stacked experts and layers that the data never reached have none: rounded to nearest"
    )


def _of_modules(waiting: dict[int, MergeJob], paths: Sequence[str]) -> list[MergeJob]:
    """The jobs of these modules, which then wait no longer."""
    wanted = set(paths)
    found = [job for job in waiting.values() if any(item.placed.module.path in wanted for item in job.updates)]
    for job in found:
        del waiting[id(job)]
    return found
