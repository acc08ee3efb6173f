"""Run jobs on threads: a plain loop for one worker, and results in the order of the jobs for any number."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from mapconv.runtime.cores import core_count

Job = TypeVar("Job")
Result = TypeVar("Result")

#: More threads than this wait for memory and disk, not for each other's arithmetic.
MAX_WORKERS = 8


def worker_count(bytes_per_worker: int, budget: int = 256 << 20) -> int:
    """As many workers as there are cores, as long as their buffers fit in ``budget``; at least one."""
    return max(1, min(core_count(), MAX_WORKERS, budget // max(1, bytes_per_worker)))


def workers_for(sizes: Sequence[int], budget: int) -> int:
    """How many workers ``in_order`` is best given for jobs that take ``sizes`` bytes, and about as much time.

    Those that leave no room for another of their kind run one at a time, on one core: not worth it where the others are
    done long before them, and all cores had better work on each job in turn.
    """
    alone, cores = sum(size for size in sizes if 2 * size > budget), min(core_count(), MAX_WORKERS)
    return cores if alone * cores <= sum(sizes) else worker_count(max(sizes), budget)


def in_order(
    run: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    *,
    nbytes: Callable[[Job], int] = lambda _: 0,
    budget: int = 0,
) -> Iterator[Result]:
    """Yield ``run(job)`` for each job, in order, with at most a few results waiting in memory.

    A job that takes ``nbytes`` starts when it fits into ``budget`` beside those that run, or alone. An error in one job
    stops those that have not started and is raised here. With one worker, jobs run in the calling thread and torch
    keeps its own threads; with more, each worker computes on one core.
    """
    if workers == 1:
        yield from map(run, jobs)
        return
    threads = torch.get_num_threads()
    started: list[int] = []

    def begin() -> None:
        started.append(threading.get_native_id())
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(workers, initializer=begin)
    waiting: deque[tuple[Future[Result], int]] = deque()
    try:
        for job in jobs:
            size = nbytes(job)
            while running := [(future, taken) for future, taken in waiting if taken and not future.done()]:
                if size + sum(taken for _, taken in running) <= budget:
                    break
                wait([future for future, _ in running], return_when=FIRST_COMPLETED)
            waiting.append((pool.submit(run, job), size))
            # While a large one keeps its place, several small ones run beside it.
            if len(waiting) > (4 if budget else 2) * workers:
                yield waiting.popleft()[0].result()
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        wait_for_ends(started)
        torch.set_num_threads(threads)  # the setting is partly global to the process


def wait_for_ends(threads: Iterable[int]) -> None:
    """Wait until the system has ended threads, by their native ids, that Python has joined; at most a second.

    Until then they give their memory back to MKL, under a lock: a process that the caller forks in that moment, as a
    ``DataLoader`` does, has the lock held for ever, and its first product of matrices never ends.
    """
    threads, end = list(threads), time.monotonic() + 1
    while any(os.path.exists(f"/proc/self/task/{thread}") for thread in threads) and time.monotonic() < end:
        time.sleep(1e-4)
