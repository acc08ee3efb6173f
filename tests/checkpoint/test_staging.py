"""Outputs that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from mapconv.checkpoint import staging
from mapconv.checkpoint.staging import (
    awaits,
    check_output,
    remove_file,
    replace_file,
    replaced_file,
    staged_folder,
    staged_with,
)
from mapconv.errors import OutputError
from tests.files import listing


def write(out, text, *, force=False):
    with staged_folder(out, force=force) as staging:
        (staging / "config.json").write_text(text)


def test_a_block_that_ends_well(tmp_path):
    with staged_folder(tmp_path / "out", force=False) as staging:
        (staging / "config.json").write_text("new")
        assert staging.parent == tmp_path
        assert staging.name.startswith(".out.partial-")
        assert not (tmp_path / "out").exists()
    assert listing(tmp_path).keys() == {"out", "out/config.json"}


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_nothing(stop, tmp_path):
    def fail() -> None:
        with staged_folder(tmp_path / "out", force=False) as staging:
            (staging / "config.json").write_text("half")
            raise stop

    with pytest.raises(stop):
        fail()
    assert not any(tmp_path.iterdir())


def test_a_block_that_fails_leaves_the_old_result(tmp_path):
    write(tmp_path / "out", "old")
    before = listing(tmp_path)
    with pytest.raises(ValueError, match="stop"), staged_folder(tmp_path / "out", force=True):
        raise ValueError("stop")
    assert listing(tmp_path).keys() == before.keys()
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_force_replaces_everything(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "more").write_text("old")
    write(tmp_path / "out", "new", force=True)
    assert listing(tmp_path).keys() == {"out", "out/config.json"}
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_there_is_always_a_result_while_it_is_replaced(tmp_path, monkeypatch):
    """One exchange, no moment without OUT; whoever has the old folder open keeps it."""
    write(tmp_path / "out", "old")
    monkeypatch.setattr(Path, "rename", lambda *paths: pytest.fail("renamed in two steps"))
    write(tmp_path / "out", "new", force=True)
    assert listing(tmp_path).keys() == {"out", "out/config.json"}
    assert (tmp_path / "out" / "config.json").read_text() == "new"


@pytest.fixture
def two_steps(monkeypatch) -> None:
    """A file system that cannot exchange two folders."""
    monkeypatch.setattr("mapconv.checkpoint.exchange._exchanged", lambda *paths: False)


def test_force_replaces_in_two_steps(two_steps, tmp_path):
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new", force=True)
    assert listing(tmp_path).keys() == {"out", "out/config.json"}
    assert (tmp_path / "out" / "config.json").read_text() == "new"


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("step", [1, 2])
def test_what_interrupts_the_two_steps_loses_nothing(step, done, stop, two_steps, tmp_path, monkeypatch):
    """Before or after either rename: OUT is the old result or, after the second, the new one."""
    write(tmp_path / "out", "old")
    honest, calls = Path.rename, 0

    def interrupted(self, target):
        nonlocal calls
        calls += 1
        if calls == step and not done:
            raise stop
        result = honest(self, target)
        if calls == step:
            raise stop
        return result

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(stop):
        write(tmp_path / "out", "new", force=True)
    assert listing(tmp_path).keys() == {"out", "out/config.json"}
    assert (tmp_path / "out" / "config.json").read_text() == ("new" if (step, done) == (2, True) else "old")


@pytest.mark.parametrize("force", [False, True])
def test_what_a_kill_left_aside_comes_back(force, tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.replaced-00000000")
    with pytest.raises(OutputError, match="exists already"):
        check_output(tmp_path / "out", force=False, inputs=[])
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    (tmp_path / "out").rename(tmp_path / ".out.replaced-00000000")
    with pytest.raises(ValueError, match="stop"), staged_folder(tmp_path / "out", force=force):
        raise ValueError("stop")
    assert listing(tmp_path).keys() == {"out", "out/config.json"}


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with staged_folder(tmp_path / "out", force=False) as staging:
        (staging / "below").mkdir()
        for name in ("config.json", "model.safetensors", "below/x.jinja"):
            (staging / name).write_text("new")
        assert not (tmp_path / "out").exists()
        folder = str(staging)
    assert {path.removeprefix(f"{folder}/") for path in flushed} == {
        "config.json",
        "model.safetensors",
        "below/x.jinja",
    }


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    def race() -> None:
        with staged_folder(tmp_path / "out", force=False):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "config.json").write_text("theirs")

    with pytest.raises(OutputError, match="was created in the meantime"):
        race()
    assert listing(tmp_path).keys() == {"out", "out/config.json"}
    assert (tmp_path / "out" / "config.json").read_text() == "theirs"


def test_leftovers_go_unless_somebody_holds_them(tmp_path):
    dead, alive, other = (tmp_path / f".{name}" for name in ("out.partial-1", "out.partial-2", "output.partial-3"))
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "half").write_text("half")
    holder = os.open(alive, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    write(tmp_path / "out", "new")
    os.close(holder)
    assert {path.name for path in tmp_path.iterdir()} == {"out", alive.name, other.name}


def test_two_writers_of_a_file_do_not_disturb_each_other(tmp_path):
    out = tmp_path / "a.json"
    with replaced_file(out) as slow:
        slow.write(b"slow")
        replace_file(out, b"fast")
        assert out.read_bytes() == b"fast"
    assert out.read_bytes() == b"slow"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_is_removed_takes_its_leftovers_along(tmp_path):
    out = tmp_path / "state"
    replace_file(out, b"state")
    (tmp_path / ".state.partial-0123").write_bytes(b"of a killed run")
    (tmp_path / ".states.partial-0123").write_bytes(b"another's")
    remove_file(out)
    assert [path.name for path in tmp_path.iterdir()] == [".states.partial-0123"]


def test_a_relative_path_and_missing_parents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a/b/out"), "new")
    assert (tmp_path / "a" / "b" / "out" / "config.json").read_text() == "new"


def pair(tmp_path: Path, text: str, *, force: bool = False) -> None:
    adapter = staged_folder(tmp_path / "adapter", force=force)
    with staged_with(tmp_path / "base", adapter, tmp_path / "adapter", force=force) as (base, other):
        for folder in (base, other):
            (folder / "config.json").write_text(text)


@pytest.mark.parametrize("exchanging", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_of_two_outputs_both_appear_or_none(there, exchanging, tmp_path, monkeypatch):
    if not exchanging:
        monkeypatch.setattr("mapconv.checkpoint.exchange._exchanged", lambda *paths: False)
    if there:
        pair(tmp_path, "old")
    before, honest = listing(tmp_path), staging.put_in_place

    def no_adapter(folder: Path, out: Path, *, force: bool) -> None:
        if out.name == "adapter":
            raise OSError("the disk is gone")
        honest(folder, out, force=force)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "put_in_place", no_adapter)
        with pytest.raises(OSError, match="the disk is gone"):
            pair(tmp_path, "new", force=there)
    assert listing(tmp_path) == before
    pair(tmp_path, "new", force=there)
    assert {(tmp_path / name / "config.json").read_text() for name in ("base", "adapter")} == {"new"}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("there", [True, False])
def test_a_kill_between_two_outputs_is_finished_by_the_next_run(there, tmp_path, monkeypatch):
    if there:
        pair(tmp_path, "old")
    honest = staging.put_in_place

    def killed(folder: Path, out: Path, *, force: bool) -> None:
        if out.name == "adapter":
            os._exit(9)
        honest(folder, out, force=force)

    process = os.fork()
    if process == 0:
        monkeypatch.setattr(staging, "put_in_place", killed)
        try:
            pair(tmp_path, "new", force=there)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert (tmp_path / "base" / "config.json").read_text() == "new"
    assert awaits(tmp_path / "base", tmp_path / "adapter") != there
    assert not awaits(tmp_path / "base", tmp_path / "another")
    pair(tmp_path, "newer", force=there)
    assert {(tmp_path / name / "config.json").read_text() for name in ("base", "adapter")} == {"newer"}
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["config.json"]
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(OutputError, match="created in the meantime"):
        pair(tmp_path, "newest")
