"""Outputs that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from mapconv.checkpoint.staging import staged_folder
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


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    def race() -> None:
        with staged_folder(tmp_path / "out", force=False):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "config.json").write_text("theirs")

    with pytest.raises(OutputError, match="appeared"):
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


def test_a_relative_path_and_missing_parents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("a/b/out"), "new")
    assert (tmp_path / "a" / "b" / "out" / "config.json").read_text() == "new"
