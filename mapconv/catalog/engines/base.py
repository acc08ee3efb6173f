"""What an engine must offer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from mapconv.catalog.entries import Job
from mapconv.catalog.work import Outcome
from mapconv.errors import WorkerDiedError

#: A job whose worker died is given to another one this often.
RETRIES_AFTER_DEATH = 1


class Engine(Protocol):
    """Runs jobs, in any order, and survives workers that die."""

    def run(self, jobs: Iterable[Job]) -> Iterator[list[tuple[Job, Outcome]]]:
        """Yield what is finished, as soon as it is, in batches; closing the iterator stops all work at once."""
        ...


def died(job: Job, how: str, deaths: int) -> Outcome:
    """The outcome of a job whose workers died under it."""
    error = (
        f"the worker that converted {' and '.join(job.sources)} died, {deaths} times in all ({how}): a crash, or the "
        f"system's answer to too little memory; do it alone with `mapconv {job.command}`, or with fewer workers."
    )
    table = {"status": "failed", "kind": WorkerDiedError.__name__, "error": error, "stage": None}
    return Outcome(table | {"attempts": deaths, "seconds": None})
