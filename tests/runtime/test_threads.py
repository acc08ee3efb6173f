"""Results in the order of the jobs, on one thread and on several."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from mapconv.runtime import cores
from mapconv.runtime.threads import in_order, worker_count, workers_for


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_keep_the_order_of_the_jobs(workers):
    def slow_first(job: int) -> int:
        time.sleep(0.002 * (3 - job % 4))
        return job * job

    assert list(in_order(slow_first, range(30), workers)) == [job * job for job in range(30)]


def test_one_worker_is_a_plain_loop_in_this_thread():
    assert set(in_order(lambda job: threading.get_ident(), range(3), 1)) == {threading.get_ident()}


def test_several_workers_are_several_threads():
    meeting = threading.Barrier(3, timeout=30)  # nobody passes unless three jobs run at the same time
    assert list(in_order(lambda job: meeting.wait() >= 0, range(3), 3)) == [True] * 3


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_stops_what_has_not_started(workers):
    ran = []

    def run(job: int) -> None:
        ran.append(job)
        if job == 2:
            raise RuntimeError("job 2")
        time.sleep(0.01)

    with pytest.raises(RuntimeError, match="job 2"):
        list(in_order(run, range(100), workers))
    assert len(ran) < 50


@pytest.mark.parametrize("workers", [2, 4])
def test_few_results_wait_in_memory(workers):
    taken = []

    def jobs():
        for job in range(100):
            taken.append(job)
            yield job

    results = in_order(lambda job: job, jobs(), workers)
    assert next(results) == 0
    assert len(taken) <= 2 * workers + 1
    results.close()


def test_torchs_threads_are_as_before():
    before = torch.get_num_threads()
    list(in_order(lambda job: torch.ones(4).sum(), range(8), 2))
    assert torch.get_num_threads() == before


def test_no_thread_is_left_that_a_fork_would_find_ending():
    """Whoever forks next, as a DataLoader does, must not inherit a lock of MKL's that an ending thread holds."""

    def run(matrix):
        assert (matrix @ matrix).isfinite().all()
        return threading.get_native_id()

    for _ in range(50):
        found = set(in_order(run, [torch.eye(64)] * 4, 2))
        assert not any(os.path.exists(f"/proc/self/task/{thread}") for thread in found)


def test_workers_share_the_budget():
    assert worker_count(1 << 40) == 1
    assert worker_count(0) >= 1
    assert worker_count(1 << 20, budget=1 << 20) == 1


def test_jobs_run_side_by_side_as_far_as_their_memory_goes():
    sizes, lock, running, most = [5, 3, 3, 9, 1, 1, 20, 2, 6, 6], threading.Lock(), [], []

    def run(job: int) -> int:
        with lock:
            running.append(sizes[job])
            most.append(sum(running))
        time.sleep(0.005)
        with lock:
            running.remove(sizes[job])
        return job

    assert list(in_order(run, range(10), 3, nbytes=sizes.__getitem__, budget=10)) == list(range(10))
    assert max(most) == 20  # which ran alone
    assert max(total for total in most if total != 20) <= 10
    assert any(total not in sizes for total in most)  # others ran together


def test_small_jobs_run_on_while_a_large_one_does():
    first = threading.Event()

    def run(job: int) -> bool:
        if job == 5:
            first.set()
        return job != 0 or first.wait(timeout=30)  # the large one ends when the fifth behind it has run

    assert all(in_order(run, range(7), 2, nbytes=lambda job: 8 if job == 0 else 1, budget=10))


def test_jobs_that_fill_the_memory_get_all_cores_unless_the_others_take_as_long(monkeypatch):
    for count, expected in ((1, 1), (2, 2), (4, 1)):
        monkeypatch.setattr(cores, "_cores", count)
        assert workers_for([9, 3, 3, 3], budget=10) == expected
    assert workers_for([2, 2, 2, 2], budget=10) == 4
    assert workers_for([9, 9], budget=10) == 1
