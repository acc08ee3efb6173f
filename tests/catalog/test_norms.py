"""A base's norms are computed once: then a LoRA reads nothing of its base, and a changed base is never served stale."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save

import mapconv
import mapconv.refit.norms
from mapconv.checkpoint.reader import TensorReader
from tests.catalog.conftest import contents, make_adapter, make_base
from tests.files import edit_tensors


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path, base):
    return make_adapter(tmp_path / "adapter", base)


@pytest.fixture
def read_from(monkeypatch) -> dict[str, int]:
    """Bytes of tensors read, by file; a new process has nothing at hand."""
    counts: dict[str, int] = {}
    honest = TensorReader.read_range

    def counted(self, ref, start, stop, buffer):
        counts[str(ref.file)] = counts.get(str(ref.file), 0) + stop - start
        return honest(self, ref, start, stop, buffer)

    monkeypatch.setattr(TensorReader, "read_range", counted)
    return counts


def forget() -> None:
    mapconv.refit.norms._kept.clear()


def test_the_second_adapter_reads_nothing_of_its_base(base, adapter, read_from, tmp_path):
    first = mapconv.upgrade(adapter, tmp_path / "first")
    assert read_from.pop(str(base / "model.safetensors")) == 4 * 64
    for forgotten in (False, True):
        if forgotten:
            forget()
        again = mapconv.upgrade(adapter, tmp_path / "again", force=True)
        assert str(base / "model.safetensors") not in read_from
        assert contents(again.out) == contents(first.out)
    weights = load_file(base / "model.safetensors")
    for module in first.modules:
        # 64 squares summed in float64.
        exact = float(torch.linalg.vector_norm(weights[f"{module.path}.weight"].double()))
        assert abs(module.base_norm - exact) <= 64 * 2**-53 * exact


def test_without_a_cache_the_bytes_are_the_same(base, adapter, read_from, tmp_path, monkeypatch):
    cached = mapconv.upgrade(adapter, tmp_path / "cached").out
    monkeypatch.setenv("MAPCONV_CACHE", "off")
    plain = mapconv.upgrade(adapter, tmp_path / "plain").out
    assert read_from[str(base / "model.safetensors")] == 2 * 4 * 64
    assert contents(plain) == contents(cached)


def test_a_dora_still_reads_its_base(base, adapter, read_from, tmp_path):
    mapconv.upgrade(adapter, tmp_path / "first")
    read_from.clear()
    mapconv.upgrade(make_adapter(tmp_path / "dora", base, use_dora=True), tmp_path / "second")
    assert read_from[str(base / "model.safetensors")]


@pytest.mark.parametrize("how", ["later", "in place", "same time", "same time in place"])
def test_a_changed_base_is_read_again(how, base, adapter, tmp_path):
    mapconv.upgrade(adapter, tmp_path / "before")
    path = base / "model.safetensors"
    status = path.stat()
    if "in place" in how:  # the same file, written to; with the old time, as some tools restore it
        content = path.read_bytes()
        while time.time_ns() <= status.st_ctime_ns + 20_000_000:  # the kernel's clock for files ticks
            pass
        weights = {name: tensor * 2 for name, tensor in load_file(path).items()}
        path.write_bytes(save(weights))
        assert len(path.read_bytes()) == len(content)
        if "same time" in how:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            assert (path.stat().st_mtime_ns, path.stat().st_ino) == (status.st_mtime_ns, status.st_ino)
    elif how == "same time":  # another file of the same size and time, as a careful copy brings it
        other = shutil.copy2(path, tmp_path / "other.safetensors")
        edit_tensors(other, lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(other, path)
    else:
        while time.time_ns() <= status.st_mtime_ns:
            pass
        edit_tensors(path, lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])
    after = mapconv.upgrade(adapter, tmp_path / "after").modules
    before = mapconv.upgrade(adapter, tmp_path / "plain", dry_run=False).modules
    assert [module.base_norm for module in after] == [module.base_norm for module in before]
    weights = load_file(path)
    for module in after:
        exact = float(torch.linalg.vector_norm(weights[f"{module.path}.weight"].double()))
        assert abs(module.base_norm - exact) <= 64 * 2**-53 * exact


BROKEN = (
    b"", b"{", b"[]", b"\xff", b'{"version": 1, "weights": {}}', b'{"version": 2, "norms": {}}',
    b'{"version": 2, "weights": {"x": 3}}', b'{"version": 2, "weights": {"x": ["nan", "0"]}}',
    b'{"version": 2, "weights": {"x": ["0x1p+0"]}}', b'{"version": 2, "weights": {"x": ["-0x1p+0", "0"]}}',
    b'{"version": 2, "weights": {"x": ["0x1p+0", "inf"]}}', b'{"version": 2, "weights": {"x": ["0", "0", "0"]}}',
)  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_cache_is_made_again_with_a_note(text, base, adapter, cache, tmp_path):
    first = mapconv.upgrade(adapter, tmp_path / "first").out
    (path,) = cache.rglob("*.json")
    whole = path.read_bytes()
    path.write_bytes(text)
    forget()
    again = mapconv.upgrade(adapter, tmp_path / "again")
    assert [note for note in again.notes if str(path) in note and "made again" in note]
    assert contents(again.out) == contents(first)
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(base, adapter, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MAPCONV_CACHE", str(tmp_path / "file" / "below"))
    assert mapconv.upgrade(adapter, tmp_path / "out").out.is_dir()


def test_a_base_with_nan_is_refused_each_time(base, adapter, tmp_path):
    edit_tensors(base / "model.safetensors", lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    for _ in range(2):
        with pytest.raises(mapconv.MapconvError, match="NaN"):
            mapconv.upgrade(adapter, tmp_path / "out")
