"""Worker processes of this machine, each an interpreter of its own that takes one job at a time from a pipe.

Not ``concurrent.futures``: there one death breaks the whole pool, and does not tell whose job it was. Here a worker's
pipe closes when it dies; another takes its place, and its job is tried once more.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator

from mapconv.catalog.engines.base import RETRIES_AFTER_DEATH, died
from mapconv.catalog.entries import Job
from mapconv.catalog.work import Outcome
from mapconv.errors import DependencyError
from mapconv.runtime.cores import core_count

#: Workers in a row that may be killed before they are ready (too little memory, somebody's `kill`).
_KILLED_AT_START = 3
_CODE = "from mapconv.catalog.engines.worker import main; main()"


class ProcessEngine:
    """``workers`` processes that share this machine's cores; ``lock`` is a descriptor that they keep open."""

    def __init__(self, workers: int, lock: int | None = None) -> None:
        self._count, self._lock = workers, lock
        self._cores = max(1, core_count() // workers)

    def run(self, jobs: Iterable[Job]) -> Iterator[list[tuple[Job, Outcome]]]:
        waiting, again = iter(jobs), deque()
        deaths: dict[str, int] = {}
        killed_at_start = 0
        workers: set[_Worker] = set()
        selector = selectors.DefaultSelector()

        def give(worker: _Worker) -> None:
            job = again.popleft() if again else next(waiting, None)
            if job is not None:
                worker.send(job)
            else:
                selector.unregister(worker.pipe)
                workers.discard(worker)
                worker.end()

        def start() -> None:
            worker = _Worker(self._cores, self._lock)
            workers.add(worker)
            selector.register(worker.pipe, selectors.EVENT_READ, worker)

        try:
            for _ in range(self._count):
                start()
            while workers:
                batch = []
                for key, _ in selector.select():
                    worker: _Worker = key.data
                    line = worker.pipe.readline()
                    if line.endswith(b"\n"):
                        if worker.job is not None:
                            batch.append((worker.job, Outcome(**json.loads(line))))
                        worker.ready, killed_at_start = True, 0
                        give(worker)
                        continue
                    selector.unregister(worker.pipe)
                    workers.discard(worker)
                    how = worker.end()
                    if not worker.ready:
                        killed_at_start += 1
                        if not worker.was_killed or killed_at_start > _KILLED_AT_START:
                            raise DependencyError(f"a worker process cannot start ({how}): see its message above.")
                        start()
                        continue
                    if worker.job is not None:
                        job, count = worker.job, deaths.get(worker.job.entry, 0) + 1
                        deaths[job.entry] = count
                        if count > RETRIES_AFTER_DEATH:
                            batch.append((job, died(job, how, count)))
                        else:
                            again.append(job)
                    # Another takes its place, if there is anything left to do.
                    if again or (job := next(waiting, None)) is not None:
                        again.extend([] if again else [job])
                        start()
                if batch:
                    yield batch
        finally:
            for worker in workers:
                worker.kill()
            selector.close()


class _Worker:
    """One process and the job that it has; ``ready`` once it has loaded what the work needs."""

    def __init__(self, cores: int, lock: int | None) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": str(cores),  # read by torch when it is loaded
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(cores), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            pass_fds=() if lock is None else (lock,),
        )
        # Both are pipes.
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._jobs, self.pipe = self._process.stdin, self._process.stdout
        self.job: Job | None = None
        self.ready = False

    def send(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(BrokenPipeError):  # its death shows in the other pipe
            self._jobs.write(json.dumps(job.to_dict()).encode() + b"\n")
            self._jobs.flush()

    def end(self) -> str:
        """Wait for a process that ends by itself, or has died; returns how."""
        with contextlib.suppress(BrokenPipeError):
            self._jobs.close()
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self.pipe.close()
        if status >= 0:
            return f"exit status {status}"
        return f"signal {-status}, {signal.Signals(-status).name}"

    @property
    def was_killed(self) -> bool:
        """Whether a signal that no program handles ended it, which says nothing of the next one."""
        return self._process.returncode == -signal.SIGKILL

    def kill(self) -> None:
        self._process.kill()
        self.end()
