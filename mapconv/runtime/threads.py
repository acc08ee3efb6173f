"""Run jobs on threads: a plain loop for one worker, and results in the order of the jobs for any number."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")

#: More threads than this wait for memory and disk, not for each other's arithmetic.
MAX_WORKERS = 8


_cores: int | None = None


def limit_cores(count: int) -> None:
    """Use at most ``count`` cores in this process, which shares the machine with others of its kind."""
    global _cores
    _cores = count
    torch.set_num_threads(count)


def core_count() -> int:
    """The cores that this process may use."""
    return _cores or len(os.sched_getaffinity(0))


def worker_count(bytes_per_worker: int, budget: int = 256 << 20) -> int:
    """As many workers as there are cores, as long as their buffers fit in ``budget``; at least one."""
    return max(1, min(core_count(), MAX_WORKERS, budget // max(1, bytes_per_worker)))


def in_order(run: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """Yield ``run(job)`` for each job, in order, with at most a few results waiting in memory.

    An error in one job stops those that have not started and is raised here. With one worker, jobs run in the calling
    thread and torch keeps its own threads; with more, each worker computes on one core.
    """
    if workers == 1:
        yield from map(run, jobs)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(run, job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # the setting is partly global to the process
