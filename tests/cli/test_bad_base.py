"""Base models whose files are broken, and base models that an adapter was not made for."""

from __future__ import annotations

import json
import math

import pytest
import torch

import mapconv
from tests.cli.refusals import assert_refused, nothing_written
from tests.files import copy, edit_json, edit_tensors, read_header, read_tensors, write_header
from tests.models import merged_by_peft

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def refuse(run, lora, tmp_path):
    """``upgrade`` and ``merge`` refuse the base, in the same words, and write nothing."""

    def check(base, *words, adapter=lora):
        with nothing_written(tmp_path, lora.parent):
            assert_refused(run("upgrade", adapter, "--base", base, "-o", tmp_path / "out"), *words)
            assert_refused(run("merge", adapter, "--base", base, "-o", tmp_path / "out"), *words)

    return check


@pytest.fixture
def own_sharded(sharded, tmp_path):
    return copy(sharded, tmp_path / "sharded")


def test_no_such_folder(refuse, tmp_path):
    refuse(tmp_path / "absent", tmp_path / "absent", "--base")


def test_no_weights(refuse, own_base):
    (own_base / WEIGHTS).unlink()
    refuse(own_base, WEIGHTS, INDEX)


def test_pickled_weights(refuse, own_base):
    (own_base / WEIGHTS).rename(own_base / "pytorch_model.bin")
    refuse(own_base, "pickle")


@pytest.mark.parametrize("keep", [0, 5, 100, -4])
def test_truncated(keep, refuse, own_base):
    content = (own_base / WEIGHTS).read_bytes()
    (own_base / WEIGHTS).write_bytes(content[:keep])
    refuse(own_base, WEIGHTS)


def test_git_lfs_pointer(refuse, own_base):
    (own_base / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refuse(own_base, "Git LFS pointer")


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ""])
def test_index_that_points_outside_its_folder(name, refuse, own_sharded):
    index = json.loads((own_sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (own_sharded / INDEX).write_text(json.dumps(index))
    refuse(own_sharded, INDEX, "outside its folder")


@pytest.mark.parametrize("name", ["absent.safetensors", "x" * 5000, "nul\0.safetensors", 5, None, ["a"]])
def test_index_that_names_no_file(name, refuse, own_sharded):
    index = json.loads((own_sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (own_sharded / INDEX).write_text(json.dumps(index))
    refuse(own_sharded, INDEX)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 50_000])
def test_index_that_is_no_index(content, refuse, own_sharded):
    (own_sharded / INDEX).write_text(content)
    refuse(own_sharded, INDEX)


def test_missing_shard(refuse, own_sharded):
    shard = sorted(own_sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refuse(own_sharded, shard.name, "missing shard")


def test_shards_and_index_that_disagree(refuse, own_sharded):
    first, second = sorted(own_sharded.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    refuse(own_sharded, first.name)


def test_hostile_header(refuse, own_base):
    header, data = read_header(own_base / WEIGHTS)
    header["lm_head.weight"]["shape"] = [1 << 40, 1 << 40]
    write_header(own_base / WEIGHTS, header, data)
    refuse(own_base, "lm_head.weight", "bytes")


def test_values_that_are_not_finite(refuse, own_base, dora):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(own_base / WEIGHTS, lambda tensors: tensors[name].view(-1)[7].fill_(math.nan))
    refuse(own_base, name, "NaN or infinity")
    refuse(own_base, name, "NaN or infinity", adapter=dora)


@pytest.mark.parametrize("content", ["", "not json", "[]", '"text"', "\xff"])
def test_model_config_that_is_no_table(content, run, own_base, lora, tmp_path):
    (own_base / "config.json").write_bytes(content.encode("latin-1"))
    with nothing_written(tmp_path):
        for dtype in ("auto", "bfloat16"):
            result = run("merge", lora, "--base", own_base, "-o", tmp_path / "out", "--dtype", dtype)
            assert_refused(result, own_base / "config.json")


@pytest.mark.parametrize("quantization", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp8"])
def test_quantized(quantization, refuse, own_base):
    edit_json(own_base / "config.json", quantization_config=quantization)
    refuse(own_base, "quantized", "--base")


def test_quantized_tensors(refuse, own_base):
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(own_base / WEIGHTS, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    refuse(own_base, name, "F8_E4M3")


def test_a_model_of_another_shape_is_listed_with_the_nearest_names(run, own_base, lora, tmp_path):
    def change(tensors):
        for name in list(tensors):
            if ".layers.0." in name:
                tensors[name.replace("down_proj", "down_projection")] = tensors.pop(name)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(48, 40)

    edit_tensors(own_base / WEIGHTS, change)
    with nothing_written(tmp_path):
        result = run("merge", lora, "--base", own_base, "-o", tmp_path / "out")
    assert_refused(result, "2 of the adapter's 14 modules", "[48, 40]", "[48, 32]")
    assert "model.layers.0.mlp.down_projection.weight" in result.err


def test_float16_output_that_overflows(run, own_base, lora, tmp_path):
    edit_tensors(own_base / WEIGHTS, lambda tensors: tensors["lm_head.weight"].view(-1)[0].fill_(1e6))
    with nothing_written(tmp_path):
        result = run("merge", lora, "--base", own_base, "-o", tmp_path / "out", "--dtype", "float16")
    assert_refused(result, "lm_head.weight", "F16", "overflow")


class TestFingerprint:
    """A MAP adapter knows the norms of the weights that it was made for."""

    @pytest.fixture(params=["lora", "dora"])
    def map_adapter(self, request, tmp_path):
        mapconv.upgrade(request.getfixturevalue(request.param), tmp_path / "map")
        return tmp_path / "map"

    def test_another_base_is_refused(self, run, map_adapter, other_base, tmp_path):
        with nothing_written(tmp_path):
            result = run("merge", map_adapter, "--base", other_base, "-o", tmp_path / "out")
        assert_refused(result, "made for a base", "--force")

    def test_one_changed_weight_is_enough(self, run, map_adapter, own_base, tmp_path):
        name = "model.layers.1.mlp.down_proj.weight"
        edit_tensors(own_base / WEIGHTS, lambda tensors: tensors[name][3, 4].add_(0.01))
        with nothing_written(tmp_path):
            assert_refused(run("merge", map_adapter, "--base", own_base, "-o", tmp_path / "out"), name)

    def test_force_accepts_it(self, run, map_adapter, other_base, tmp_path):
        result = run("merge", map_adapter, "--base", other_base, "-o", tmp_path / "out", "--force")
        assert result.status == 0
        entries = json.loads((map_adapter / "map_config.json").read_text())["modules"]
        merged, original = read_tensors(tmp_path / "out"), read_tensors(other_base)
        factors = merged_by_peft(other_base, map_adapter)
        for entry in entries:
            # MAP's gains hold for any base; PEFT's magnitude would not.
            if entry["base_gain"] == 1.0:
                weight = merged[entry["base_tensor"]].double()
                assert float((weight - factors[entry["base_tensor"]]).norm() / weight.norm()) <= 1e-7
            assert not torch.equal(merged[entry["base_tensor"]], original[entry["base_tensor"]])

    def test_the_same_values_in_another_file_are_accepted(self, run, map_adapter, sharded, tmp_path):
        assert run("merge", map_adapter, "--base", sharded, "-o", tmp_path / "out").status == 0


def test_what_a_library_says_in_its_second_line_is_said(run, dora, own_base, text, tmp_path):
    edit_json(own_base / "config.json", num_attention_heads=3)
    result = run("upgrade", dora, "--base", own_base, "-o", tmp_path / "out", "--data", text)
    assert_refused(result, "configuration cannot be loaded", "is not a multiple of the number of attention heads (3)")
