"""``mapconv report`` as a command: what it says, refuses, replaces, and leaves behind when it is killed."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import signal
import struct
import time

import pytest

import mapconv
from mapconv.checkpoint import staging
from tests.files import copy, listing
from tests.reporting.conftest import find_chromium
from tests.reporting.samples import save_adapter, save_ledger


def size_of(png: bytes) -> tuple[int, int]:
    """(width, height) of a PNG, by its header."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_an_adapter_on_the_command_line(run, adapter, tmp_path):
    done = run("report", adapter, "-o", tmp_path / "new" / "a.html")
    assert done.status == 0
    assert done.out.startswith(f"{adapter} (adapter, 12 modules) → {tmp_path / 'new' / 'a.html'}\n")
    table = json.loads(run("report", adapter, "-o", tmp_path / "b.html", "--json").out)
    assert table["nbytes"] == (tmp_path / "b.html").stat().st_size
    assert (table["kind"], table["items"], table["png"]) == ("adapter", 12, None)
    assert (tmp_path / "b.html").read_bytes() == (tmp_path / "new" / "a.html").read_bytes()


@pytest.mark.parametrize("kind", ["adapter", "merged", "catalog"])
def test_a_picture_for_slides(kind, request, run, tmp_path):
    path = request.getfixturevalue(kind)
    done = run("report", path, "-o", tmp_path / "a.html", "--png", tmp_path / "a.png")
    assert done.status == 0, done.err
    assert done.err == ""
    picture = (tmp_path / "a.png").read_bytes()
    assert size_of(picture) == (1920, 1080)


def test_a_picture_of_hostile_names(tmp_path):
    paths = ["layers.0.$\\frac$", "layers.0.<b>", "layers.0.\u202e\u4e2d", "x" * 300]
    folder = save_adapter(tmp_path / "$x^{$", paths)
    lines = [{"entry": "a", "status": "done", "method": "$\\bad$", "kl": 1e-300}, {"entry": "b", "method": None}]
    for place in (folder, save_ledger(tmp_path / "$ledger", lines)):
        assert size_of(mapconv.report(place, f"{place}.html", png=f"{place}.png").png.read_bytes()) == (1920, 1080)


def test_a_picture_without_matplotlib_is_refused_before_anything_is_written(run, adapter, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("mapconv.commands.report.find_spec", lambda name: None if name == "matplotlib" else found(name))
    done = run("report", adapter, "-o", tmp_path / "a.html", "--png", tmp_path / "a.png")
    assert done.status == 1
    assert "pip install 'mapconv[report]'" in done.err
    assert not any(tmp_path.iterdir())
    assert run("report", adapter, "-o", tmp_path / "a.html").status == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["absent", "-o", "a.html"], "not a MAP adapter, a merged model or a catalog's output"),
        (["plain", "-o", "a.html"], "not a MAP adapter yet: run `mapconv upgrade plain`"),
        (["empty", "-o", "a.html"], "not a MAP adapter, a merged model or a catalog's output"),
        (["adapter", "-o", "adapter/map_config.json", "--force"], "does not end with .html"),
        (["adapter", "-o", "a.html", "--png", "a.jpg"], "does not end with .png"),
        (["adapter", "-o", "taken.html"], "pass --force"),
        (["adapter", "-o", "a.html", "--png", "taken.png"], "pass --force"),
        (["adapter", "-o", "folder.html", "--force"], "not a file"),
        (["adapter", "-o", "link.html", "--force"], "not a file"),
        (["adapter", "-o", "taken.html/a.html"], "not a writable folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(words, said, run, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(adapter, tmp_path / "adapter")
    copy(adapter, tmp_path / "plain")
    (tmp_path / "plain" / "map_config.json").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    for name in ("taken.html", "taken.png"):
        (tmp_path / name).write_text("old")
    (tmp_path / "link.html").symlink_to(tmp_path / "taken.html")
    before = listing(tmp_path)
    done = run("report", *words)
    assert done.status == 1
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert listing(tmp_path) == before


def test_force_replaces_and_nothing_else_is_left(run, adapter, tmp_path):
    (tmp_path / "a.html").write_text("old")
    (tmp_path / ".a.html.partial-0123").write_text("of a killed run")
    assert run("report", adapter, "-o", tmp_path / "a.html", "--force").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


def test_the_default_output_lies_beside_the_folder(run, adapter, tmp_path):
    own = copy(adapter, tmp_path / "poems")
    before = listing(own)
    done = run("report", own)
    assert done.status == 0, done.err
    assert (tmp_path / "poems-report.html").read_text().startswith("<!doctype html>")
    assert str(tmp_path / "poems-report.html") in done.out
    assert listing(own) == before
    assert "poems-report.html exists already" in run("report", own).err


def _stop_before_the_rename(adapter, out):
    """Write as the command does, and wait to be killed when all but the name is there."""
    staging.os.fsync = lambda descriptor: time.sleep(60)
    mapconv.report(adapter, out, force=True)


def test_killed_while_it_writes(adapter, tmp_path):
    out = tmp_path / "a.html"
    out.write_text("old")
    victim = multiprocessing.get_context("fork").Process(target=_stop_before_the_rename, args=(adapter, out))
    victim.start()
    while victim.is_alive() and not any(tmp_path.glob(".a.html.partial-*")):
        time.sleep(0.005)
    victim.kill()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert out.read_text() == "old"
    mapconv.report(adapter, out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_without_a_browser_its_tests_are_skipped_and_say_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        find_chromium()
