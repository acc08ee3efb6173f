"""What macOS lacks, taken away here: the same results by other calls. And Windows, which is refused."""

from __future__ import annotations

import errno
import importlib.util
import os
import sys

import pytest

import mapconv
from mapconv.catalog import faults
from mapconv.checkpoint import flushing, readahead
from mapconv.checkpoint.flushing import flush_data
from mapconv.checkpoint.staging import staged_folder
from mapconv.checkpoint.writer import copy_range
from mapconv.runtime import cores


def module_again(module):
    """The module's source, run anew under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_again", module.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh


def test_cores_without_sched_getaffinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cores.core_count() == 6
    monkeypatch.setattr(cores, "_cores", 2)
    assert cores.core_count() == 2


def test_flushing_without_fdatasync(monkeypatch, tmp_path):
    flushed = []
    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.setattr(os, "fsync", flushed.append)
    flush_data(7)
    assert flushed == [7]


def test_flushing_without_sync_file_range(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda *arguments, **named: object())
    module_again(flushing).begin_flush(7)


def test_faults_without_eremoteio(monkeypatch):
    monkeypatch.delattr(errno, "EREMOTEIO")
    fresh = module_again(faults)
    assert fresh.is_transient(OSError(errno.EIO, "again"))
    assert not fresh.is_transient(OSError(errno.EACCES, "never"))


def test_a_folder_replaced_without_renameat2(monkeypatch, tmp_path):
    monkeypatch.setattr("ctypes.CDLL", lambda *arguments, **named: object())
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with staged_folder(out, force=True) as staging:
        (staging / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_reading_ahead_without_posix_fadvise(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "posix_fadvise")
    (tmp_path / "weights").write_bytes(bytes(100))
    readahead.read_ahead([tmp_path / "weights"], None, whole_base=True).join()
    jobs = [(tmp_path / "weights", 0, 100)]
    assert list(readahead.reading_ahead(jobs, lambda job: [job])) == jobs


def test_copying_without_copy_file_range(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "copy_file_range")
    (tmp_path / "source").write_bytes(bytes(range(256)) * 8)
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "target", "wb+") as target:
        copy_range(source.fileno(), target.fileno(), 100, 3, 1500)
        target.seek(0)
        assert target.read() == bytes(3) + (bytes(range(256)) * 8)[100:1600]


def test_windows_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ImportError, match=r"^mapconv runs on Linux and macOS, not on Windows itself: .* WSL\.$"):
        module_again(mapconv)
