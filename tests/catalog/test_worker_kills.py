"""SIGKILL at random moments, to workers and to whole runs of the process engine: no entry is lost, torn or done twice.

Workers, pipes, staging folders and the ledger are the real ones; only what is written into an output is made up, so
that a worker needs no torch and starts in a moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import mapconv
from tests.catalog.conftest import contents, ledger

ENTRIES, KILLS = 24, 6
_WORK = """
import os, time
from pathlib import Path
from mapconv.catalog import work
from mapconv.checkpoint.staging import staged_folder
work.prepare = lambda cores=None: None
def run_job(job):
    (Path(os.environ["MARKS"]) / f"{job.entry}.{os.getpid()}").touch()
    with staged_folder(Path(job.output), force=True) as staging:
        for part in range(1, 5):
            (staging / f"model-{part:05d}-of-00004.safetensors").write_text(job.entry * 10_000)
            time.sleep(0.005)
        (staging / "map_config.json").write_text(job.entry)
    return work.Outcome({"status": "done", "stage": None, "attempts": 1, "seconds": 0.0, "content": "c", "base": None})
work.run_job = run_job
"""


@pytest.fixture
def marks(monkeypatch, tmp_path) -> Path:
    """Work that leaves ``ENTRY.PID`` in this folder when it begins."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "sitecustomize.py").write_text(_WORK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'fake'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    (tmp_path / "marks").mkdir()
    monkeypatch.setenv("MARKS", str(tmp_path / "marks"))
    return tmp_path / "marks"


@pytest.fixture
def catalog(tmp_path) -> Path:
    path = tmp_path / "catalog.jsonl"
    entries = [{"source": "absent", "output": f"e{number:02d}"} for number in range(ENTRIES)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def assert_complete(out: Path) -> None:
    found = contents(out)
    assert len(found) == 5 * ENTRIES
    for name, data in found.items():
        entry = name.partition("/")[0]
        assert data.decode() == (entry if name.endswith(".json") else entry * 10_000), name
    assert not list(out.glob(".*.partial-*"))
    assert {line["status"] for line in ledger(out).values()} == {"done"}


def workers() -> list[int]:
    """The processes that this one's engine has started."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text().split():
                if b"engines.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def test_workers_killed_at_any_moment(marks, catalog, tmp_path):
    chance, stop, killed = random.Random(0), threading.Event(), []

    def kill() -> None:
        seen = 0
        while len(killed) < KILLS and not stop.wait(0.001):
            begun = len(list(marks.iterdir()))
            if begun == seen:
                continue
            seen = begun
            stop.wait(0.03 * chance.random())
            alive = workers()
            if alive:
                killed.append(chance.choice(alive))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result = mapconv.convert_catalog(catalog, tmp_path / "out", workers=2)
    finally:
        stop.set()
        killer.join()
    assert len(killed) >= 4, "hardly a kill fell into the run: the test proves nothing on this machine"
    assert {failure.kind for failure in result.failures} <= {"WorkerDiedError"}
    again = mapconv.convert_catalog(catalog, tmp_path / "out", workers=2, retry_failed=True)
    assert (again.done, again.failed) == (ENTRIES, 0)
    assert again.converted == result.failed, "what was done stays done"
    assert_complete(tmp_path / "out")


def test_runs_killed_at_any_moment(marks, catalog, tmp_path):
    out, chance, landed = tmp_path / "out", random.Random(1), 0
    words = [sys.executable, "-m", "mapconv", "catalog", "run", catalog, "-o", out, "--workers", "2"]
    for _ in range(2):
        before = len(list(marks.iterdir()))
        process = subprocess.Popen([*words, "--engine", "process", "-q"], stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(marks.iterdir())) == before:
            time.sleep(0.001)
        time.sleep(0.1 * chance.random())
        process.kill()
        landed += process.wait() == -signal.SIGKILL
        pids = {int(mark.suffix[1:]) for mark in marks.iterdir()}
        until = time.monotonic() + 10
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < until, "a worker outlives its run"
            time.sleep(0.005)
        for name, line in ledger(out).items():
            assert line["status"] == "done"
            assert (out / name / "map_config.json").read_text() == name
    assert landed, "no kill fell into the work: the test proves nothing on this machine"
    result = mapconv.convert_catalog(catalog, out, workers=2)
    assert (result.done, result.failed) == (ENTRIES, 0)
    assert_complete(out)
