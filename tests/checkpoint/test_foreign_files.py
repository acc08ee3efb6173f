"""Files of a stranger's folder: only regular ones of that folder are read, copied or sent, and none without a limit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import mapconv
from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.sidecars import check_folder, tokenizer_files
from mapconv.errors import AdapterError, CheckpointError, MapconvError
from mapconv.files import check_regular, open_regular, read_bytes
from mapconv.formats import read_adapter
from mapconv.jsonfile import read_object
from tests.files import cached


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "private.txt"
    path.write_text('{"secret": "PLANTED"}')
    return path


def test_a_link_that_stays_in_its_folder_is_read(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").symlink_to("a.json")
    assert read_object(tmp_path / "b.json", AdapterError) == {}
    linked = tmp_path.with_name(tmp_path.name + "-link")
    linked.symlink_to(tmp_path)  # the folder itself may be one: the user named it
    assert read_object(linked / "b.json", AdapterError) == {}


def test_a_link_that_leaves_its_folder_is_refused_by_name(tmp_path, secret):
    (tmp_path / "folder").mkdir()
    link = tmp_path / "folder" / "a.json"
    for target in (secret, Path("../private.txt"), tmp_path / "folder-beside" / "absent"):
        link.symlink_to(target)
        with pytest.raises(AdapterError, match=r"a\.json is a symbolic link that leaves its folder"):
            read_object(link, AdapterError)
        link.unlink()


def test_the_caches_own_links_are_read_and_no_others(own_lora, tmp_path, secret):
    snapshot = cached(own_lora, tmp_path / "hub" / "models--lab--poems")
    assert read_adapter(snapshot).method == "LoRA"
    for target in (secret, cached(own_lora, tmp_path / "hub" / "models--other--one") / "adapter_config.json"):
        (snapshot / "README.md").unlink(missing_ok=True)
        (snapshot / "README.md").symlink_to(target)
        with pytest.raises(AdapterError, match=r"README\.md is a symbolic link"):
            read_adapter(snapshot)


@pytest.mark.parametrize("form", ["a pipe", "a device", "a folder"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, form):
    path = tmp_path / "folder" / "config.json"
    path.parent.mkdir()
    match form:
        case "a pipe":
            os.mkfifo(path)
        case "a folder":
            path.mkdir()
        case "a device":
            path = Path("/dev/zero")
    with pytest.raises(CheckpointError, match=f"is {form}, expected a regular file"):
        read_object(path, CheckpointError)


def test_a_pipe_that_takes_a_files_place_is_refused_without_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "config.json")
    monkeypatch.setattr("mapconv.files.check_regular", lambda path, kind, folder: str(path))
    with pytest.raises(CheckpointError, match="is a pipe"):
        open_regular(tmp_path / "config.json", CheckpointError)


def test_a_file_longer_than_expected_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    os.truncate(path, 1 << 40)
    with pytest.raises(CheckpointError, match="1,099,511,627,776 bytes long, expected at most 16,777,216"):
        read_object(path, CheckpointError)
    path.write_bytes(b"12345")
    assert read_bytes(path, CheckpointError, limit=5) == b"12345"
    with pytest.raises(CheckpointError, match="5 bytes long"):
        read_bytes(path, CheckpointError, limit=4)


def test_an_absent_file_is_absent(tmp_path):
    with pytest.raises(FileNotFoundError):
        check_regular(tmp_path / "config.json", CheckpointError)
    check_folder(tmp_path / "absent", CheckpointError)


@pytest.mark.parametrize(
    "name",
    ["README.md", "tokenizer.json", "additional_chat_templates/x.jinja", "adapter_model.safetensors", "LICENSE.txt"],
)
def test_no_command_follows_a_link_out_of_an_adapter(own_lora, lora, base, tmp_path, secret, run, name):
    """With what the link leads to planted in its place, nothing of it is in any output, for there is none."""
    (own_lora / name).parent.mkdir(exist_ok=True)
    (own_lora / name).unlink(missing_ok=True)
    (own_lora / name).symlink_to(secret)
    for command in (
        ("upgrade", own_lora, "-o", tmp_path / "out", "--base", base),
        ("upgrade", own_lora, "-o", tmp_path / "out", "--base", base, "--dry-run"),
        ("merge", own_lora, "-o", tmp_path / "out", "--base", base),
        ("inspect", own_lora),
        ("verify", lora, "--against", own_lora, "--base", base),
    ):
        done = run(*command)
        assert done.status == 1, command
        assert f"{name} is a symbolic link that leaves its folder" in done.err, command
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "LICENSE", "modeling_llama.py", "config.json"])
def test_no_command_follows_a_link_out_of_a_base(lora, own_base, tmp_path, secret, name):
    (own_base / name).unlink(missing_ok=True)
    (own_base / name).symlink_to(secret)
    for command in (mapconv.upgrade, mapconv.merge):
        with pytest.raises(CheckpointError, match="symbolic link"):
            command(lora, tmp_path / "out", base=own_base)
    assert not (tmp_path / "out").exists()


def test_a_linked_folder_of_templates_is_refused(own_lora, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.jinja").write_text("PLANTED")
    (own_lora / "additional_chat_templates").symlink_to(outside)
    with pytest.raises(AdapterError, match=r"x\.jinja is a symbolic link"):
        read_adapter(own_lora)
    with pytest.raises(MapconvError, match="symbolic link"):
        tokenizer_files(own_lora)


def test_links_that_nobody_reads_are_nobodys_business(own_lora, base, tmp_path, secret):
    (own_lora / "train.jsonl").symlink_to(secret)
    (own_lora / "runs").symlink_to(tmp_path)
    mapconv.upgrade(own_lora, tmp_path / "out", base=base)
    shutil.rmtree(tmp_path / "out")


def test_a_weights_link_in_a_base_is_refused(own_base, tmp_path):
    (own_base / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (own_base / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a symbolic link that leaves its folder"):
        read_checkpoint(own_base)
