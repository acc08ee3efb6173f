"""Where a result may be written: what is taken, what --force replaces, what is never replaced, what has no room."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mapconv.checkpoint.exchange import hidden_sibling
from tests.cli.refusals import assert_refused, nothing_written
from tests.conftest import Run
from tests.files import copy, read_tensors

#: Takes from a process root's power to pass over permissions, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of
#: <linux/capability.h>; others have none.
BOUND_BY_PERMISSIONS = """
import ctypes, os
if os.geteuid() == 0:
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capget(header, sets) == 0
    sets[0] &= ~(1 << 1 | 1 << 2)
    assert ctypes.CDLL(None).capset(header, sets) == 0
"""


@pytest.fixture(params=["upgrade", "merge"])
def convert(request, run, own_lora, own_base):
    """Run ``upgrade`` or ``merge`` of the same adapter into a folder."""

    def command(out, *options):
        return run(request.param, own_lora, "--base", own_base, "-o", out, *options)

    return command


def test_out_exists(convert, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with nothing_written(tmp_path):
        assert_refused(convert(out), out, "exists already", "--force")


@pytest.mark.parametrize(
    "marks",
    [
        ["config.json", "model.safetensors"],
        ["adapter_config.json"],
        ["map_config.json"],
        ["map_merge.json"],
        ["model-00001-of-00002.safetensors"],
        [],
    ],
)
def test_force_replaces_a_model_an_adapter_or_an_empty_folder(marks, convert, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for mark in marks:
        (out / mark).write_text("{}")
        (out / "LICENSE.old").write_text("old")
    assert convert(out, "--force").status == 0
    assert not (out / "LICENSE.old").exists()
    assert read_tensors(out)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "lora", "out"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["photo.jpg"], ["photo.jpg", "neither a model nor an adapter"]),
        (["config.json", "README.md", "LICENSE"], ["neither a model nor an adapter"]),
        (["config.json", "model.safetensors", ".git/HEAD", "precious.txt"], [".git/", "precious.txt"]),
        (["adapter_config.json", "adapter_model.safetensors", "optimizer.pt"], ["optimizer.pt"]),
        (["map_config.json", "v2/map_config.json"], ["v2/"]),
        (["config.json", "model.safetensors", "additional_chat_templates/notes.txt"], ["notes.txt"]),
        (["map_config.json", *(f"{n}.txt" for n in range(7))], ["0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more"]),
    ],
)
def test_force_leaves_a_folder_that_holds_anything_else(entries, words, convert, tmp_path):
    out = tmp_path / "holiday"
    for entry in entries:
        (out / entry).parent.mkdir(parents=True, exist_ok=True)
        (out / entry).write_text("{}")
    with nothing_written(tmp_path):
        assert_refused(convert(out, "--force"), *words, "--force will not replace")


def test_force_replaces_what_a_merge_or_an_upgrade_wrote(run, own_lora, own_base, tmp_path):
    """Also of a base without a config.json, whose shards have names of its own."""
    weights = load_file(own_base / "model.safetensors")
    (own_base / "model.safetensors").rename(own_base / "part.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "part.safetensors")}
    (own_base / "model.safetensors.index.json").write_text(json.dumps(index))
    (own_base / "config.json").unlink()
    out = tmp_path / "out"
    for command in ("merge", "merge", "upgrade", "upgrade", "merge"):
        assert run(command, own_lora, "--base", own_base, "-o", out, "--force").status == 0
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("name", ["n" * 240, "ü" * 120, "n" * 255])
def test_long_names(name, convert, tmp_path):
    (tmp_path / hidden_sibling(tmp_path / name, ".partial-00000000").name).mkdir()
    for options in ([], ["--force"]):
        assert convert(tmp_path / name, *options).status == 0
        assert {path.name for path in tmp_path.iterdir()} == {"base", "lora", name}


def test_a_name_that_no_file_system_takes(convert, tmp_path):
    with nothing_written(tmp_path):
        assert_refused(convert(tmp_path / ("n" * 256)), "too long")


def test_force_leaves_a_file_and_a_link(convert, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with nothing_written(tmp_path):
        for name in ("file", "link"):
            assert_refused(convert(tmp_path / name, "--force"), "not a folder")


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("name", ["lora", "base", "lora/../lora", ".", "link-to-base"])
def test_out_is_an_input_or_holds_one(name, force, convert, tmp_path):
    (tmp_path / "link-to-base").symlink_to(tmp_path / "base")
    with nothing_written(tmp_path):
        assert_refused(convert(tmp_path / name, *force), "input", "choose another output folder")


def test_a_failure_with_force_leaves_the_old_result(run, own_base, own_lora, tmp_path):
    old = copy(own_lora, tmp_path / "out")
    (own_base / "model.safetensors").write_bytes(b"")
    with nothing_written(tmp_path):
        assert_refused(run("upgrade", own_lora, "--base", own_base, "-o", old, "--force"), "empty")


def test_missing_parents_are_made(convert, tmp_path):
    assert convert(tmp_path / "new" / "folders" / "out").status == 0
    assert read_tensors(tmp_path / "new" / "folders" / "out")


def test_a_parent_that_is_a_file(convert, tmp_path):
    (tmp_path / "file").write_text("x")
    with nothing_written(tmp_path):
        assert_refused(convert(tmp_path / "file" / "out"), tmp_path / "file")


def test_default_out_of_upgrade_is_beside_the_source(run, own_lora, tmp_path, monkeypatch):
    assert run("upgrade", own_lora).status == 0
    assert (tmp_path / "lora-map" / "map_config.json").is_file()
    # A trailing slash and a bare dot name the same folder.
    assert_refused(run("upgrade", f"{own_lora}/"), "lora-map", "exists already")
    monkeypatch.chdir(own_lora)
    assert_refused(run("upgrade", "."), "lora-map", "exists already")


def test_leftovers_of_a_killed_run_are_removed_and_other_folders_kept(convert, tmp_path):
    (tmp_path / ".out.partial-00000000").mkdir()
    (tmp_path / ".out.partial-00000000" / "model.safetensors").write_text("half")
    (tmp_path / ".other.partial-00000000").mkdir()
    assert convert(tmp_path / "out").status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"base", "lora", "out", ".other.partial-00000000"}


@pytest.fixture
def process(forked, own_lora, own_base, tmp_path_factory):
    """Run a conversion as a process of its own, under limits that bind only that process."""

    def command(name: str, out: Path, limits: str) -> Run:
        words = ["mapconv", name, str(own_lora), "--base", str(own_base), "-o", str(out)]
        folder = tmp_path_factory.mktemp("process") / "run"
        done = forked.run(f"{limits}\nfrom mapconv.cli import main\nmain()", words, dict(os.environ), folder)
        return Run(done.returncode, done.stdout, done.stderr)

    return command


@pytest.mark.parametrize("name", ["upgrade", "merge"])
@pytest.mark.parametrize("limit", [1000, 12_000])
def test_no_space(name, limit, process, tmp_path):
    """The system refuses to let a file grow: at the header, and in the midst of the tensors."""
    with nothing_written(tmp_path):
        result = process(
            name, tmp_path / "out", f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
        )
        assert_refused(result, "larger than", "limit")


def test_less_room_than_the_result_needs(convert, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with nothing_written(tmp_path):
        assert_refused(convert(tmp_path / "out"), "only 10,000 are free", "free some space")


def test_disk_that_fills_while_writing(convert, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.pwrite", full)
    with nothing_written(tmp_path):
        assert_refused(convert(tmp_path / "out"), "no space left on the disk")


@pytest.mark.parametrize("name", ["upgrade", "merge"])
def test_no_permission_to_write(name, process, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with nothing_written(tmp_path):
        result = process(name, tmp_path / "locked" / "out", BOUND_BY_PERMISSIONS)
        assert_refused(result, tmp_path / "locked", "permission")


def test_no_permission_to_read(process, own_lora, tmp_path):
    (own_lora / "adapter_model.safetensors").chmod(0)
    with nothing_written(tmp_path):
        result = process("upgrade", tmp_path / "out", BOUND_BY_PERMISSIONS)
        assert_refused(result, own_lora / "adapter_model.safetensors", "permission")
    assert "output" not in result.err
