"""The plain loop: one job after another in this process, with all of its cores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mapconv.catalog.entries import Job
from mapconv.catalog.work import Outcome, prepare, run_job


class SerialEngine:
    def run(self, jobs: Iterable[Job]) -> Iterator[list[tuple[Job, Outcome]]]:
        prepare()
        for job in jobs:
            yield [(job, run_job(job))]
