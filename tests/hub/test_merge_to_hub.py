"""``mapconv merge --push-to``: a model merged on the Hub, of which this disk never has more than two files."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.disk import peak_of
from tests.fake_hub import FakeHub
from tests.fake_hub_store import Blob
from tests.hub.conftest import QUICK, error_of, files_of

WIDE, TO = "lab/wide", "me/merged"
#: Of three files of the base, as they are first read, and all else that is small.
HEADERS = 400_000
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
#: The command line with portions that a small model fills, so that the base is fetched ahead and given back.
SMALL_PORTIONS = f"""
from mapconv.merging import streaming
streaming.PORTION = streaming.SLICE = 1 << 18
{QUICK}
"""
NO_HOLES = f"""
from mapconv.merging import streaming
streaming.can_punch = lambda folder: False
{QUICK}
"""
FULL_DISK = f"""
import errno, os
from mapconv.checkpoint import writer
left = [9_000_000]
def full(descriptor, data, offset, write=os.pwrite):
    left[0] -= len(data)
    if left[0] < 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(descriptor, data, offset)
writer.os = type(os)("os")
writer.os.__dict__.update(vars(os), pwrite=full)
writer.copy_range = lambda source, target, at, to, count: full(target, os.pread(source, count, at), to)
{QUICK}
"""
SMALL_DISK = f"""
import shutil
shutil.disk_usage = lambda path: type("Usage", (), {{"free": 1_000_000}})
{QUICK}
"""


@pytest.fixture(scope="module")
def expected(models, forked, tmp_path_factory) -> dict[str, Blob]:
    """What ``merge -o`` and ``push`` make of the same adapter and base."""
    folder = tmp_path_factory.mktemp("expected")
    with FakeHub(folder / "server") as hub:
        hub.repo(WIDE, files_of(models.wide))
        code = f"""
import mapconv
mapconv.merge({str(models.wide_lora)!r}, {str(folder / "out")!r}, base={WIDE!r})
mapconv.push({str(folder / "out")!r}, {TO!r}, license="mit")
"""
        env = hub.environment(folder / "home") | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
        done = forked.run(code, ["python"], env, folder / "process")
        assert done.returncode == 0, done.stderr
        return hub.files(TO)


@pytest.fixture
def words(models, hub, tmp_path) -> list[object]:
    """The command, with the base on the Hub."""
    hub.repo(WIDE, files_of(models.wide))
    place = tmp_path / "work"
    return ["merge", models.wide_lora, "--base", WIDE, "--push-to", TO, "--work-dir", place, "--license", "mit", "-q"]


@pytest.mark.parametrize(
    ("xet", "code"),
    [(False, SMALL_PORTIONS), (True, SMALL_PORTIONS), (False, NO_HOLES)],
    ids=["lfs", "xet", "a file system that frees no parts of files"],
)
def test_the_commit_is_that_of_a_local_merge_which_is_pushed(models, python, words, expected, tmp_path, xet, code):
    with FakeHub(tmp_path / "own-server", xet=xet) as hub:
        hub.repo(WIDE, files_of(models.wide))
        with peak_of(tmp_path / "work", every=0.001) as peak:
            done = python(hub, code, *words, "--json")
        assert done.returncode == 0, done.stderr
        assert hub.files(TO) == expected
        assert len(hub.store.repos[TO].commits) == 2  # the one that the Hub makes for a new repository, and ours
        largest = max(expected[name].size for name in SHARDS)
        assert largest < peak[0] < 2 * largest + HEADERS
        table, record = json.loads(done.stdout), json.loads(expected["map_merge.json"].content)
        assert table["pushed"]["commit"] == hub.store.repos[TO].resolve("main").sha
        assert table["pushed"]["taken_over"] == SHARDS[2:]  # the adapter changes no tensor in it
        assert table["survival"].items() <= record["survival"].items()
        assert len(hub.store.xet_hashes() if xet else hub.log("PUT", "/cdn/")) == 2
        whole = hub.files(WIDE)[SHARDS[2]].sha256
        assert sum(request.sent for request in hub.log("GET", f"/cdn/{whole}")) <= 64 << 10
        assert files_of(tmp_path / "work") == {}


def test_kills_are_gone_on_after_with_the_same_commit(run, start, hub, words, expected, tmp_path):
    """Killed while the first file is sent, while the second is read, before the commit, and when that has landed."""
    second = hub.files(WIDE)[SHARDS[1]].sha256
    for method, pattern, landed in (
        ("PUT", "/cdn/", False),
        ("GET", f"/cdn/{second}", False),
        ("POST", "/commit/", False),
        ("POST", "/commit/", True),
    ):
        held = hub.fault(method, pattern, hold=True, after=landed)
        # Before a file is sent, another run may take the place of a killed one.
        process = start(hub, *words, *(["--dtype", "bfloat16"] if method == "PUT" else []))
        assert held.reached.wait(60)
        process.kill()
        process.wait(30)
        held.drop = not landed  # the request dies with its sender
        held.release.set()
        assert ("map_merge.json" in hub.files(TO)) is landed
        if method == "GET":
            # The base moves on; what was found when the first file was sent stays.
            hub.store.add_files(hub.store.repos[WIDE], {"config.json": b"{}", SHARDS[0]: b"other"})
            refused = run(hub, *words, "--dtype", "bfloat16", status=1)
            for word in ("unfinished merge of another kind", 'dtype is "auto", not "bfloat16"', "--work-dir"):
                assert word in error_of(refused)
    done = run(hub, *words)
    assert "nothing new" in done.stdout
    assert "went on after 3 of 3 weights files" in done.stderr
    assert hub.files(TO) == expected
    assert len(hub.store.repos[TO].commits) == 2
    assert len(hub.log("PUT", "/cdn/")) == 3  # one of them died with its sender
    assert files_of(tmp_path / "work") == {}


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_the_hub_loses_is_made_again_once(start, hub, words, expected, times):
    held = [hub.fault("POST", "/commit/", hold=True) for _ in range(times)]
    process = start(hub, *words)
    for fault in held:
        assert fault.reached.wait(60)
        sent = hub.log("PUT", "/cdn/")[0].path.rpartition("/")[2]
        del hub.store.objects[sent]
        fault.release.set()
    _, errors = process.communicate(60)
    if times == 1:
        assert process.returncode == 0, errors
        assert hub.files(TO) == expected
    else:
        assert f"the Hub took {SHARDS[0]} for {TO} twice and has lost it twice" in errors
        assert len(hub.store.repos[TO].commits) == 1


def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(python, run, hub, words, expected):
    done = python(hub, SMALL_DISK, *words, home="home")
    assert done.returncode == 1
    assert "the room of two weights files, but only" in error_of(done)
    done = python(hub, FULL_DISK, *words, home="home")
    assert done.returncode == 1
    assert "there is no room left in" in error_of(done)
    assert "goes on after 2 of 3 files" in error_of(done)
    assert len(hub.store.repos[TO].commits) == 1
    run(hub, *words)
    assert hub.files(TO) == expected
    assert len(hub.log("PUT", "/cdn/")) == 2


def test_a_dry_run_reads_headers_and_writes_nowhere(run, hub, words, tmp_path):
    done = run(hub, *words, "--dry-run")
    assert f"would publish {TO}: 21 tensors in 3 files" in done.stdout
    assert {request.method for request in hub.requests} == {"GET", "HEAD"}
    assert sum(request.sent for request in hub.log("GET", "/cdn/")) <= 3 * (64 << 10)
    assert not (tmp_path / "work").exists()


def test_a_base_on_this_disk_and_a_repository_of_somebody_else(models, run, hub, tmp_path):
    words = ["merge", models.lora_map, "--base", models.base, "--work-dir", tmp_path / "work", "-q"]
    message = error_of(run(hub, *words, "--push-to", TO, status=1))
    assert "--base-id owner/name" in message
    assert hub.requests == []
    message = error_of(run(hub, *words, "--push-to", "lab/x", "--base-id", "lab/tiny-llama", status=1))
    assert "may not write to lab/x (403" in message
    run(hub, *words, "--push-to", TO, "--base-id", "lab/tiny-llama", "--private")
    assert hub.store.repos[TO].readers == {"me"}
    assert json.loads(hub.content(TO, "map_merge.json"))["base"]["name"] == "lab/tiny-llama"


def test_another_base_than_that_of_a_map_adapter_is_refused_before_a_file_is_sent(models, run, hub, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(models.base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    words = ["merge", models.lora_map, "--base", other, "--base-id", "lab/tiny-llama", "--push-to", TO]
    message = error_of(run(hub, *words, "-q", status=1))
    assert "model.layers.0.self_attn.q_proj.weight" in message
    assert "--force" in message
    assert hub.log("PUT", "") == []
