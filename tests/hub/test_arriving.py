"""A merge into a folder begins with the base's files that are here, while the others still come from the Hub."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import mapconv
from mapconv.checkpoint.index import read_checkpoint
from tests.hub.conftest import error_of, files_of
from tests.hub.test_ranges import WIDE, transferred


@pytest.fixture(scope="module")
def merged(models, tmp_path_factory) -> dict[str, bytes]:
    """What the merge makes of a base in a folder here, but for the record of where that was."""
    out = tmp_path_factory.mktemp("merged") / "out"
    mapconv.merge(models.wide_lora, out, base=models.wide)
    return model_files(out)


@pytest.fixture
def base(models, hub):
    return hub.repo(WIDE, files_of(models.wide))


def model_files(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if name != "map_merge.json"}


def arguments(models, out: Path) -> list[object]:
    return ["merge", models.wide_lora, "-o", out, "--base", WIDE, "--quiet"]


def hash_of(base, name: str) -> str:
    """What the file is called where the server keeps large ones."""
    return base.resolve("main").files[name].sha256


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_files_are_merged_while_others_come(models, merged, base, run, start, hub, tmp_path):
    names = sorted(path.name for path in models.wide.glob("*.safetensors"))
    assert len(names) > 2
    # Headers come by ranges, and the whole file with the second request for it.
    held = []
    for name in names[:2]:
        hub.fault("GET", hash_of(base, name), change=lambda answer: answer)
        held.append(hub.fault("GET", hash_of(base, name), hold=True))
    process = start(hub, *arguments(models, tmp_path / "out"))
    assert all(one.reached.wait(60) for one in held)
    assert not hub.log("GET", hash_of(base, names[2]))[1:]  # more than one file is not fetched ahead
    held[0].release.set()

    def written() -> bool:
        staged = list(tmp_path.glob(f".out.*/{names[0]}"))
        return bool(staged) and staged[0].read_bytes() == merged[names[0]]

    until(written)
    assert not (tmp_path / "out").exists()
    held[1].release.set()
    process.communicate(60)
    assert process.returncode == 0
    assert model_files(tmp_path / "out") == merged

    # The files stay in the client's cache: a second merge asks for nothing of them.
    before = transferred(hub)
    run(hub, *arguments(models, tmp_path / "again"))
    assert model_files(tmp_path / "again") == merged
    assert transferred(hub) == before


def test_a_kill_leaves_nothing_and_what_has_come_stays(models, merged, base, run, start, hub, tmp_path):
    names = sorted(path.name for path in models.wide.glob("*.safetensors"))
    hub.fault("GET", hash_of(base, names[1]), change=lambda answer: answer)
    held = hub.fault("GET", hash_of(base, names[1]), hold=True)
    process = start(hub, *arguments(models, tmp_path / "out"))
    assert held.reached.wait(60)
    blob = tmp_path / "home" / "hub" / f"models--{WIDE.replace('/', '--')}" / "blobs" / hash_of(base, names[0])
    until(blob.exists)
    process.kill()
    process.wait(30)
    held.release.set()
    assert not (tmp_path / "out").exists()
    asked = len(hub.log("GET", hash_of(base, names[0])))
    run(hub, *arguments(models, tmp_path / "out"))
    assert model_files(tmp_path / "out") == merged
    assert len(hub.log("GET", hash_of(base, names[0]))) == asked
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out.")]


def test_what_does_not_fit_is_refused_before_the_weights_come(models, base, run, hub, tmp_path):
    done = run(hub, "merge", models.lora, "-o", tmp_path / "out", "--base", WIDE, status=1)
    assert "do not fit this base" in error_of(done)
    assert 0 < transferred(hub) < sum(ref.nbytes for ref in read_checkpoint(models.wide).tensors.values()) / 10


def test_a_file_that_cannot_be_had_is_one_sentence(models, base, run, hub, tmp_path):
    name = max(path.name for path in models.wide.glob("*.safetensors"))
    hub.fault("GET", hash_of(base, name), change=lambda answer: answer)
    hub.fault("GET", hash_of(base, name), status=503, times=99)
    done = run(hub, *arguments(models, tmp_path / "out"), status=1)
    assert "trouble (503)" in error_of(done)
    assert not (tmp_path / "out").exists()
