"""Adapters whose files are missing, broken or not what they seem."""

from __future__ import annotations

import struct

import pytest

from tests.cli.refusals import assert_refused, nothing_written
from tests.files import edit_json, edit_tensors, read_header, write_header

WEIGHTS = "adapter_model.safetensors"
LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.fixture
def refuse(run, base, own_lora, tmp_path):
    """Every command that reads the adapter refuses it, in the same words, and writes nothing."""

    def check(*words):
        with nothing_written(tmp_path):
            for command in (
                ["inspect", own_lora],
                ["upgrade", own_lora, "--base", base],
                ["merge", own_lora, "--base", base, "-o", tmp_path / "out"],
                ["verify", base, "--against", own_lora, "--base", base],
            ):
                assert_refused(run(*command), *words)

    return check


def test_no_such_folder(refuse, own_lora, tmp_path):
    own_lora.rename(tmp_path / "elsewhere")
    refuse(own_lora, "does not exist")


def test_a_file_instead_of_a_folder(run, own_lora, base, tmp_path):
    """A file of the adapter stands for its folder; any other is not an adapter."""
    for name in (WEIGHTS, "adapter_config.json"):
        assert run("inspect", own_lora / name, "--base", base).status == 0
    (own_lora / "notes.txt").write_text("of no use")
    with nothing_written(tmp_path):
        assert_refused(run("upgrade", own_lora / "notes.txt", "--base", base), "is a file", "folder")
    assert run("upgrade", own_lora / WEIGHTS, "--base", base).status == 0
    assert (own_lora.parent / f"{own_lora.name}-map" / "map_config.json").is_file()


def test_without_config(refuse, own_lora):
    (own_lora / "adapter_config.json").unlink()
    refuse("no adapter_config.json", "the factors' rank is")


def test_a_config_that_is_a_git_lfs_pointer(refuse, own_lora):
    (own_lora / "adapter_config.json").write_text(LFS_POINTER)
    refuse("adapter_config.json", "Git LFS pointer", "git lfs pull")


def test_a_pickle_that_is_a_git_lfs_pointer(refuse, own_lora):
    (own_lora / WEIGHTS).unlink()
    (own_lora / "adapter_model.bin").write_text(LFS_POINTER)
    refuse("adapter_model.bin", "Git LFS pointer", "git lfs pull")


def test_without_weights(refuse, own_lora):
    (own_lora / WEIGHTS).unlink()
    refuse(WEIGHTS)


def test_pickled_weights(refuse, own_lora):
    (own_lora / WEIGHTS).rename(own_lora / "adapter_model.bin")
    refuse("adapter_model.bin", "pickle")


def test_empty_weights(refuse, own_lora):
    (own_lora / WEIGHTS).write_bytes(b"")
    refuse(WEIGHTS, "is empty")


def test_weights_without_a_tensor(refuse, own_lora):
    write_header(own_lora / WEIGHTS, {"__metadata__": {"format": "pt"}}, b"")
    refuse(WEIGHTS, "holds no tensors")


def test_git_lfs_pointer(refuse, own_lora):
    (own_lora / WEIGHTS).write_text(LFS_POINTER)
    refuse(WEIGHTS, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("keep", [5, 8, 400, -1])
def test_truncated(keep, refuse, own_lora):
    content = (own_lora / WEIGHTS).read_bytes()
    (own_lora / WEIGHTS).write_bytes(content[:keep])
    refuse(WEIGHTS)


def test_bytes_after_the_last_tensor(refuse, own_lora):
    with open(own_lora / WEIGHTS, "ab") as file:
        file.write(b"\0" * 16)
    refuse(WEIGHTS, "too long")


def test_header_that_claims_gigabytes(refuse, own_lora):
    (own_lora / WEIGHTS).write_bytes(struct.pack("<Q", 50 << 30) + b"{}")
    refuse(WEIGHTS, "53,687,091,200")


def test_tensors_that_overlap(refuse, own_lora):
    header, data = read_header(own_lora / WEIGHTS)
    first, second = list(header)[1:3]
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    header[second]["data_offsets"] = [header[first]["data_offsets"][0], header[first]["data_offsets"][0] + size]
    write_header(own_lora / WEIGHTS, header, data)
    refuse(WEIGHTS, "overlaps")


def test_tensor_out_of_range(refuse, own_lora):
    header, data = read_header(own_lora / WEIGHTS)
    last = max(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"][1] += 4 * header[last]["shape"][1]
    header[last]["shape"][0] += 1
    write_header(own_lora / WEIGHTS, header, data)
    refuse(WEIGHTS, "truncated")


def test_config_that_is_not_json(refuse, own_lora):
    (own_lora / "adapter_config.json").write_text("{'r': 8}")
    refuse("adapter_config.json", "not JSON")


def test_config_that_is_a_list(refuse, own_lora):
    (own_lora / "adapter_config.json").write_text("[]")
    refuse("adapter_config.json", "expected an object")


def test_map_directory_without_its_modules(run, base, lora, tmp_path):
    assert run("upgrade", lora, "-o", tmp_path / "map").status == 0
    edit_json(tmp_path / "map" / "map_config.json", modules=[])
    with nothing_written(tmp_path):
        assert_refused(run("merge", tmp_path / "map", "-o", tmp_path / "out"), "map_config.json", "has no modules")


def test_map_directory_of_a_later_format(run, lora, tmp_path):
    assert run("upgrade", lora, "-o", tmp_path / "map").status == 0
    edit_json(tmp_path / "map" / "map_config.json", format_version=2)
    with nothing_written(tmp_path):
        assert_refused(run("merge", tmp_path / "map", "-o", tmp_path / "out"), "format_version 2")


def test_map_directory_with_other_weights(run, lora, tmp_path):
    assert run("upgrade", lora, "-o", tmp_path / "map").status == 0
    edit_tensors(
        tmp_path / "map" / WEIGHTS,
        lambda tensors: tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].mul_(1.01),
    )
    with nothing_written(tmp_path):
        refused = run("merge", tmp_path / "map", "-o", tmp_path / "out")
    assert_refused(refused, "model.layers.1.mlp.up_proj", "do not belong together")


def test_upgrading_a_map_directory(run, lora, tmp_path):
    assert run("upgrade", lora, "-o", tmp_path / "map").status == 0
    with nothing_written(tmp_path):
        assert_refused(run("upgrade", tmp_path / "map"), "MAP adapter already")
