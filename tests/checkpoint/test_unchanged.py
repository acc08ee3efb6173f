"""A base or an adapter that changes while it is read: nothing is written, and the sentence says why."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mapconv.placement.factors import FactorLoader
from tests.cli.refusals import assert_refused
from tests.files import edit_tensors


def write_in_place(path: Path) -> None:
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-4:] = b"\0\0\0\0"
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    other = Path(shutil.copy2(path, path.with_name("other")))
    edit_tensors(other, lambda tensors: [tensor.neg_() for tensor in tensors.values()])
    os.replace(other, path)


def make_nan(path: Path) -> None:
    """What the run then meets first has another sentence, which is not the reason."""
    edit_tensors(path, lambda tensors: [tensor.fill_(float("nan")) for tensor in tensors.values()])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("command", ["merge", "upgrade"])
@pytest.mark.parametrize("change", [write_in_place, replace, make_nan, truncate, os.unlink])
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_a_file_that_changes_in_the_midst(which, change, command, run, own_dora, own_base, tmp_path, monkeypatch):
    path = own_base / "model.safetensors" if which == "base" else own_dora / "adapter_model.safetensors"
    honest, loaded = FactorLoader.load, 0

    def load(self, placed):
        nonlocal loaded
        loaded += 1
        if loaded == 3:
            change(path)
        return honest(self, placed)

    monkeypatch.setattr(FactorLoader, "load", load)
    result = run(command, own_dora, "--base", own_base, "-o", tmp_path / "out")
    assert loaded >= 3
    assert_refused(result, f"{path} changed while it was being read", "run the command again")
    assert {entry.name for entry in tmp_path.iterdir()} == {"base", "dora"}


def test_reading_is_no_change(run, own_dora, own_base, tmp_path, monkeypatch):
    honest = FactorLoader.load

    def load(self, placed):
        for path in (own_base / "model.safetensors", own_dora / "adapter_model.safetensors"):
            path.read_bytes()
        return honest(self, placed)

    monkeypatch.setattr(FactorLoader, "load", load)
    assert run("merge", own_dora, "--base", own_base, "-o", tmp_path / "out").status == 0
