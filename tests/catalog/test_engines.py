"""The same bytes from every engine, and workers that die are replaced."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path

import pytest

import mapconv
from mapconv.catalog.engines import make_engine
from mapconv.catalog.entries import Job
from tests.catalog.conftest import contents, ledger, poison

#: A job of this source kills its worker, a job of SLEEPER keeps it until somebody else does.
KILLER, SLEEPER = "killer", "sleeper"


@pytest.fixture
def expected(adapters, tmp_path) -> dict[str, bytes]:
    poison(adapters / "a003", "nan")
    assert mapconv.convert_catalog(adapters, tmp_path / "serial", engine="serial").failed == 1
    return contents(tmp_path / "serial")


def test_processes_write_the_bytes_of_a_plain_loop(expected, adapters, tmp_path):
    result = mapconv.convert_catalog(adapters, tmp_path / "out", workers=2)
    assert (result.engine, result.workers, result.done, result.failed) == ("process", 2, 5, 1)
    assert contents(tmp_path / "out") == expected
    assert {name: line["status"] for name, line in ledger(tmp_path / "out").items()} == {
        name: line["status"] for name, line in ledger(tmp_path / "serial").items()
    }


@pytest.fixture
def fake_work(monkeypatch, tmp_path) -> Path:
    """Workers that need no torch: what they do is named by the job's source."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "sitecustomize.py").write_text(
        "import os, signal, time\n"
        "from mapconv.catalog import work\n"
        "work.prepare = lambda cores: None\n"
        "def run_job(job):\n"
        "    with open(os.path.join(job.output, f'{job.entry}.{os.getpid()}'), 'w'):\n"
        "        pass\n"
        "    source = job.sources[0]\n"
        "    if source == 'killer':\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if source == 'once' and len([n for n in os.listdir(job.output) if n.startswith(job.entry)]) == 1:\n"
        "        os._exit(3)\n"
        "    if source == 'sleeper':\n"
        "        time.sleep(600)\n"
        "    return work.Outcome({'status': 'done', 'attempts': 1, 'seconds': 0.0})\n"
        "work.run_job = run_job\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'fake'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def job(entry: str, source: str, marks: Path) -> Job:
    return Job(entry, (source,), None, str(marks), None, {})


def test_a_worker_that_dies_is_replaced_and_its_job_tried_once_more(fake_work):
    jobs = [job(f"j{number}", {3: "killer", 5: "once"}.get(number, "fine"), fake_work) for number in range(12)]
    outcomes = {}
    for batch in make_engine("process", workers=2).run(jobs):
        outcomes |= {one.entry: outcome for one, outcome in batch}
    assert outcomes.keys() == {one.entry for one in jobs}
    assert [name for name, outcome in outcomes.items() if not outcome.done] == ["j3"]
    table = outcomes["j3"].table
    assert (table["kind"], table["attempts"]) == ("WorkerDiedError", 2)
    assert "SIGSEGV" in table["error"]
    attempts = [mark.name.partition(".")[0] for mark in fake_work.iterdir()]
    assert (attempts.count("j3"), attempts.count("j5")) == (2, 2)
    assert len(attempts) == 14
    assert len({mark.suffix for mark in fake_work.iterdir()}) >= 4  # no process did anything after its death


def test_closing_the_iterator_kills_the_workers(fake_work):
    jobs = [job("first", "fine", fake_work), *(job(f"s{n}", "sleeper", fake_work) for n in range(2))]
    with closing(make_engine("process", workers=2).run(jobs)) as batches:
        assert [one.entry for one, _ in next(batches)] == ["first"]
        # One sleeper at least: the second worker may start too late to be given the other before the first batch.
        while len(list(fake_work.iterdir())) < 2:
            time.sleep(0.005)
    for mark in fake_work.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(mark.suffix[1:]), 0)


def test_workers_that_cannot_start_stop_the_run(fake_work, tmp_path):
    (tmp_path / "fake" / "sitecustomize.py").write_text("import os; os._exit(9)")
    with pytest.raises(mapconv.MapconvError, match="cannot start"):
        list(make_engine("process", workers=2).run([job("a", "fine", fake_work)]))


#: Ray's workers run this when they start. One job is killed each time, one once, while it writes, and then done; to do
#: the others in earnest, each worker would load torch. Nor do they load the libraries whose objects a task could send.
_DEADLY = """
import os, signal, sys
if any(word.endswith("default_worker.py") for word in sys.orig_argv):
    sys.modules |= dict.fromkeys(("pyarrow", "pydantic", "starlette"))
    from pathlib import Path
    from mapconv.catalog import work
    from mapconv.checkpoint.staging import staged_folder
    honest, prepare, asked = work.run_job, work.prepare, []
    work.prepare = lambda cores: asked.append(cores)
    def run_job(job):
        mark = os.path.join(os.environ["MARKS"], job.entry)
        seen = os.path.exists(mark)
        open(mark, "a").write("run ")
        if job.entry == "a000":
            os.kill(os.getpid(), signal.SIGSEGV)
        if job.entry == "a001" and not seen:
            with staged_folder(Path(job.output), force=True) as folder:
                (folder / "adapter_model.safetensors").write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
        if job.entry == "a001":
            prepare(asked[-1])
            return honest(job)
        return work.Outcome({"status": "failed", "stage": "upgrade", "kind": "AdapterError", "error": "made up",
                             "attempts": 1, "seconds": 0.0})
    work.run_job = run_job
"""


def test_ray_writes_the_same_bytes_and_survives_workers_that_die(fake_work, expected, adapters, tmp_path, monkeypatch):
    """One local cluster for everything, as starting it is what takes the time."""
    import ray

    from mapconv.catalog.engines.ray import start

    (tmp_path / "fake" / "sitecustomize.py").write_text(_DEADLY)
    monkeypatch.setenv("MARKS", str(fake_work))
    assert start(2, None)[1]
    try:
        result = mapconv.convert_catalog(adapters, tmp_path / "out", engine="ray", workers=2)
        assert ray.is_initialized(), "a connection that the caller made is left to it"
    finally:
        ray.shutdown()
    runs = {mark.name: mark.read_text().split() for mark in fake_work.iterdir()}
    assert {name: len(found) for name, found in runs.items()} == {
        entry.name: 2 if entry.name in ("a000", "a001") else 1 for entry in adapters.iterdir()
    }
    assert {failure.entry: failure.kind for failure in result.failures} == {
        name: "WorkerDiedError" if name == "a000" else "AdapterError" for name in runs if name != "a001"
    }
    assert contents(tmp_path / "out") == {name: data for name, data in expected.items() if name.startswith("a001/")}
