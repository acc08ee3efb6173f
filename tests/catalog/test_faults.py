"""What fails alone, what is tried again, and what stops a run that then goes on where it was."""

from __future__ import annotations

import errno
import json
import os
import time
from types import SimpleNamespace

import pytest

import mapconv
from mapconv.catalog import faults, work
from mapconv.errors import AdapterError, DiskFullError, HubError
from tests.catalog.conftest import contents, ledger, lines
from tests.cli.test_outputs import BOUND_BY_PERMISSIONS


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    taken: list[float] = []
    # Its own name alone: others wait too, for threads to end.
    monkeypatch.setattr(work, "time", SimpleNamespace(sleep=taken.append, perf_counter=time.perf_counter))
    return taken


def failing(monkeypatch, error: Exception, times: int) -> list[str]:
    """Let the conversion of a001 fail ``times`` times; returns the sources that were tried."""
    honest, tried = mapconv.upgrade, []

    def upgrade(source, out, **options):
        tried.append(source)
        if source.endswith("a001") and sum(name.endswith("a001") for name in tried) <= times:
            raise error
        return honest(source, out, **options)

    monkeypatch.setattr(mapconv, "upgrade", upgrade)
    return tried


def hub_error(transient: bool) -> HubError:
    error = HubError("the Hub answers 503.")
    error.transient = transient
    return error


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (hub_error(True), 3),
        (OSError(errno.EIO, "Input/output error"), 3),
        (OSError(errno.ESTALE, "Stale file handle"), 3),
        (hub_error(False), 1),
        (AdapterError("broken."), 1),
        (PermissionError(errno.EACCES, "denied", "x"), 1),
        (MemoryError(), 1),
        (RuntimeError("a bug"), 1),
    ],
    ids=repr,
)
def test_what_may_pass_is_tried_again(error, attempts, adapters, tmp_path, monkeypatch, waits):
    tried = failing(monkeypatch, error, times=99)
    result = mapconv.convert_catalog(adapters, tmp_path / "out")
    assert [failure.entry for failure in result.failures] == ["a001"]
    assert result.failures[0].kind == type(error).__name__
    assert ledger(tmp_path / "out")["a001"]["attempts"] == attempts
    assert len(tried) == 5 + attempts
    assert waits == [faults.FIRST_WAIT * 2**n for n in range(attempts - 1)]


def test_a_fault_that_passes_leaves_no_trace(adapters, tmp_path, monkeypatch):
    failing(monkeypatch, OSError(errno.EIO, "Input/output error"), times=2)
    assert mapconv.convert_catalog(adapters, tmp_path / "out").failed == 0
    assert ledger(tmp_path / "out")["a001"]["attempts"] == 3


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), DiskFullError("only 3 are free.")])
def test_a_full_disk_stops_the_run_and_the_next_goes_on(error, adapters, tmp_path, monkeypatch, run):
    mapconv.convert_catalog(adapters, tmp_path / "expected")
    with monkeypatch.context() as patch:
        failing(patch, error, times=99)
        result = run("catalog", "run", adapters, "-o", tmp_path / "out")
    assert result.status == 1
    (sentence,) = result.err.splitlines()
    assert "run the same command again to continue" in sentence
    assert "3 entries left" in sentence  # entries of the first base come first: a000, a002, a004
    assert lines(tmp_path / "out") == 3, "the entry that met the full disk is not to blame"
    assert mapconv.convert_catalog(adapters, tmp_path / "out").converted == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_disk_that_fills_in_the_midst_of_a_tensor_or_of_the_ledger(adapters, tmp_path, monkeypatch):
    mapconv.convert_catalog(adapters, tmp_path / "expected")
    honest, left = {"pwrite": os.pwrite, "write": os.write}, [0]

    def limited(name):
        def call(descriptor, data, *rest):
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return honest[name](descriptor, data, *rest)

        return call

    stops = 0
    for _ in range(20):
        left[0] = 2500
        with monkeypatch.context() as patch:
            for name in honest:
                patch.setattr(os, name, limited(name))
            try:
                mapconv.convert_catalog(adapters, tmp_path / "out")
                break
            except DiskFullError:
                stops += 1
    assert stops > 2
    assert mapconv.convert_catalog(adapters, tmp_path / "out").done == 6
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_an_output_folder_that_is_read_only(adapters, forked, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    words = ["mapconv", "catalog", "run", str(adapters), "-o", str(tmp_path / "out")]
    code = f"{BOUND_BY_PERMISSIONS}\nfrom mapconv.cli import main\nmain()"
    done = forked.run(code, words, dict(os.environ), tmp_path / "process")
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert "permission" in sentence
    assert str(tmp_path / "out") in sentence


def test_the_summary_of_the_command(adapters, tmp_path, run, monkeypatch):
    failing(monkeypatch, AdapterError("broken\n  in two lines."), times=99)
    result = run("catalog", "run", adapters, "-o", tmp_path / "out")
    assert result.status == 1
    assert "5 done (5 now" in result.out
    assert "1 × AdapterError, such as a001: broken in two lines." in result.out
    again = run("catalog", "run", adapters, "-o", tmp_path / "out", "--json")
    assert again.status == 1
    table = json.loads(again.out)
    assert (table["done"], table["converted"], table["failed"]) == (5, 0, 1)
    assert table["failures"][0]["entry"] == "a001"


@pytest.mark.parametrize(
    "words",
    [
        ["--engine", "serial", "--workers", "2"],
        ["--engine", "process", "--ray-address", "auto"],
        ["--workers", "0"],
        ["--limit", "0"],
        ["--engine", "dask"],
    ],
    ids=" ".join,
)
def test_wrong_usage(words, run, adapters, tmp_path):
    assert run("catalog", "run", adapters, "-o", tmp_path / "out", *words).status == 2
    assert not (tmp_path / "out").exists()


def test_faults_of_the_catalog_exit_1_before_anything_is_made(run, tmp_path):
    (tmp_path / "catalog.yaml").write_text("adapters:\n- source: a\n- source: a\n- {}\n")
    result = run("catalog", "run", tmp_path / "catalog.yaml", "-o", tmp_path / "out")
    assert result.status == 1
    first, *others = result.err.splitlines()
    assert "has 2 faults" in first
    assert [line.split(":")[0] for line in others] == ["  line 3", "  line 4"]
    assert not (tmp_path / "out").exists()
