"""Tasks on a Ray cluster: an entry is a task, and Ray gives it to another worker where one dies.

Sources and outputs must lie on storage that all nodes see under the same paths, and mapconv must be installed on them.
Without an address, a Ray of this machine is started, with as many CPUs as workers, and stopped again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from mapconv.catalog.engines.base import RETRIES_AFTER_DEATH, died
from mapconv.catalog.entries import Job
from mapconv.catalog.work import Outcome
from mapconv.errors import DependencyError

#: Ray's smallest: a task takes and returns a few hundred bytes, which do not even go through the object store.
OBJECT_STORE_BYTES = 80 << 20
#: Tasks that wait at the cluster for each worker: enough that none is idle, few enough that a stop is a stop.
_WAITING = 2
#: A local Ray gives up on itself after half a minute, which a busy machine may need.
_STARTS = 2


class RayEngine:
    def __init__(self, workers: int, address: str | None = None) -> None:
        self._workers, self._address = workers, address

    def run(self, jobs: Iterable[Job]) -> Iterator[list[tuple[Job, Outcome]]]:
        ray, ours = start(self._workers, self._address)
        try:
            task = ray.remote(num_cpus=1, max_retries=RETRIES_AFTER_DEATH)(_task)
            waiting, running = iter(jobs), {}
            while True:
                while len(running) < _WAITING * self._workers and (job := next(waiting, None)) is not None:
                    running[task.remote(job.to_dict())] = job
                if not running:
                    return
                ready, _ = ray.wait(list(running), num_returns=1)
                ready += ray.wait(list(running), num_returns=len(running), timeout=0)[0]
                finished = [(reference, running.pop(reference)) for reference in dict.fromkeys(ready)]
                yield [(job, _outcome(ray, reference, job)) for reference, job in finished]
        finally:
            if ours:
                ray.shutdown()


def _task(job: dict[str, Any]) -> dict[str, Any]:
    """What a Ray worker runs: names in, a line's fields out."""
    from mapconv.catalog.work import prepare, run_job

    prepare(cores=1)
    return asdict(run_job(Job(**job)))


def _outcome(ray: Any, reference: Any, job: Job) -> Outcome:
    try:
        return Outcome(**ray.get(reference))
    except ray.exceptions.RayTaskError as error:  # the node has no mapconv, or another one
        cause = str(error.cause).strip().splitlines() or [""]
        raise DependencyError(
            f"the Ray workers cannot run mapconv ({type(error.cause).__name__}: {cause[0][:200]}): install the same "
            "version on every node."
        ) from None
    except ray.exceptions.RayError as error:
        return died(job, type(error).__name__, 1 + RETRIES_AFTER_DEATH)


def start(workers: int, address: str | None) -> tuple[Any, bool]:
    """Ray itself, connected to the cluster at ``address`` or to one of this machine alone, and whether we did that.

    A connection that this process has already is used as it is, and left to whoever made it.
    """
    # Read by Ray's processes when they start. Memory pressure counts as a death, not as a reason to try for ever.
    for name, value in (("RAY_task_oom_retries", "1"), ("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_DEDUP_LOGS", "0")):
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise DependencyError("--engine ray needs Ray: pip install 'mapconv[ray]'.") from None
    if ray.is_initialized():
        return ray, False
    how: dict[str, Any] = {"address": address}
    if address is None:
        how = {"num_cpus": workers, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    for attempt in range(1, _STARTS + 1):
        try:
            # Ray takes the name of a level too.
            ray.init(**how, log_to_driver=False, logging_level="ERROR", configure_logging=False)  # pyright: ignore[reportArgumentType]
            return ray, True
        except Exception as error:  # Ray raises what its transports raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if address is not None or attempt == _STARTS:
            break
    where = "a local Ray does not start" if address is None else f"no Ray cluster answers at {address}"
    raise DependencyError(f"{where} ({reason.rstrip('.')}).")
