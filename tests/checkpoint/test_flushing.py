"""Weights go to the disk while more is computed, and a disk that refuses them fails the run."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch
from safetensors.torch import load_file

from mapconv.checkpoint import writer
from mapconv.checkpoint.flushing import BackgroundFlush
from mapconv.checkpoint.writer import METADATA, SpooledFile, TensorSpec, lay_out
from tests.cli.refusals import assert_refused, nothing_written


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    monkeypatch.setattr("mapconv.checkpoint.flushing.FLUSH_BYTES", 1000)


def test_it_flushes_in_another_thread_each_time_that_enough_was_written(monkeypatch):
    flushed = []
    monkeypatch.setattr("os.fdatasync", lambda descriptor: flushed.append((descriptor, threading.current_thread())))
    with BackgroundFlush() as flush:
        for _ in range(9):
            flush.wrote(3, 100)
            flush.wrote(4, 999)
        assert 3 not in {descriptor for descriptor, _ in flushed}
        flush.wrote(3, 100)
    assert {descriptor for descriptor, _ in flushed} == {3, 4}
    assert threading.current_thread() not in {thread for _, thread in flushed}


def test_the_run_fails_with_the_disk(run, lora, base, tmp_path, monkeypatch):
    def broken(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fdatasync", broken)
    with nothing_written(tmp_path):
        assert_refused(run("merge", lora, "--base", base, "-o", tmp_path / "out"), "no space left on the disk")


def test_a_spool_file_is_on_its_way_to_the_disk_while_it_is_written(monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(writer, "begin_flush", lambda descriptor, start, nbytes: begun.append((start, nbytes)))
    monkeypatch.setattr(writer, "SPOOL_BYTES", 40)
    specs = [TensorSpec(name, "F32", (10,)) for name in "abc"]
    header, _ = lay_out(tmp_path / "x", specs, METADATA)
    file = SpooledFile(tmp_path / "x.safetensors", specs)
    for spec in specs:
        file.append(spec.name, torch.ones(10))
    assert begun == [(len(header) + start, 40) for start in (0, 40, 80)]
    file.finish()
    assert set(load_file(tmp_path / "x.safetensors")) == set("abc")
