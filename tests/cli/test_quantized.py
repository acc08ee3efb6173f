"""Quantized bases as a user meets them on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.files import edit_json, read_header, read_tensors
from tests.models import save_adapter
from tests.quantized import WEIGHTS, quantize, save_plain


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save_plain(tmp_path_factory.mktemp("plain") / "base")


@pytest.fixture(scope="module")
def nf4(plain, tmp_path_factory) -> Path:
    return quantize(plain, "nf4-double", tmp_path_factory.mktemp("nf4"))


@pytest.fixture(scope="module")
def lora(plain, tmp_path_factory) -> Path:
    return save_adapter(plain, tmp_path_factory.mktemp("lora") / "lora")


def test_inspect_names_the_storage(run, nf4, lora):
    result = run("inspect", lora, "--base", nf4)
    assert result.status == 0
    assert "14 weights as bitsandbytes nf4, double quantized" in result.out
    assert f"the quantized {nf4} was given" in result.err
    assert json.loads(run("inspect", lora, "--base", nf4, "--json").out)["storages"] == {
        "bitsandbytes nf4, double quantized": 14
    }


def test_merge_says_what_becomes_of_the_codes(run, nf4, lora, tmp_path):
    result = run("merge", lora, "--base", nf4, "-o", tmp_path / "out")
    assert "is quantized (14 weights as bitsandbytes nf4" in result.err
    assert not [name for name in read_tensors(tmp_path / "out") if "quant" in name or "absmax" in name]


class TestQuantizedCopy:
    """Codes stay as they are where the adapter changes plain tensors alone."""

    @pytest.fixture
    def experts_only(self, plain, tmp_path) -> Path:
        """A base whose attention is plain and whose feed-forward layers are in codes."""
        return quantize(plain, "ct-int4", tmp_path / "bases", skip=("lm_head", "embed", "self_attn"))

    def test_bytes(self, run, experts_only, plain, tmp_path):
        edit_json(experts_only / "config.json", use_cache=True)
        adapter = save_adapter(plain, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
        out = tmp_path / "out"
        result = run("merge", adapter, "--base", experts_only, "-o", out, "--quantized", "copy")
        assert result.status == 0, result.err
        assert "copied as they are" in result.err
        old, new = read_header(experts_only / WEIGHTS)[0], read_header(out / WEIGHTS)[0]
        assert list(old) == list(new)
        changed = set()
        with safe_open(experts_only / WEIGHTS, "pt") as before, safe_open(out / WEIGHTS, "pt") as after:
            for name in before.keys():  # noqa: SIM118
                if not torch.equal(before.get_tensor(name), after.get_tensor(name)):
                    changed.add(name.split(".")[-2])
        assert changed == {"q_proj", "v_proj"}
        config = json.loads((out / "config.json").read_text())
        assert config == json.loads((experts_only / "config.json").read_text())

    def test_refused_where_a_weight_in_codes_changes(self, run, nf4, lora, tmp_path):
        result = run("merge", lora, "--base", nf4, "-o", tmp_path / "out", "--quantized", "copy")
        assert result.status == 1
        assert "leave out --quantized copy" in result.err
        assert not (tmp_path / "out").exists()

    def test_takes_no_dtype(self, run, nf4, lora, tmp_path):
        options = ("--quantized", "copy", "--dtype", "float16")
        assert run("merge", lora, "--base", nf4, "-o", tmp_path / "out", *options).status == 2


class TestVerify:
    """The source may run on the base that it was trained on, and the result on another."""

    @pytest.fixture(scope="class")
    def map_adapter(self, lora, plain, tmp_path_factory) -> Path:
        import mapconv

        out = tmp_path_factory.mktemp("map") / "map"
        mapconv.upgrade(lora, out, base=plain)
        return out

    def verify(self, run, *arguments) -> dict:
        result = run("verify", *arguments, "--samples", 1, "--json")
        assert result.status == 0, result.err
        return json.loads(result.out)

    def test_quantized_base(self, run, nf4, lora, tmp_path):
        assert run("merge", lora, "--base", nf4, "-o", tmp_path / "merged", "--dtype", "float32").status == 0
        report = self.verify(run, tmp_path / "merged", "--against", lora, "--base", nf4)
        assert report["kl"] <= 1e-9
        assert report["kl_base"] > 1e-3
        assert max(module["error"] for module in report["modules"]) <= 1e-5

    def test_another_base_is_measured(self, run, plain, nf4, lora, map_adapter):
        same = self.verify(run, map_adapter, "--against", lora, "--base", plain)
        other = self.verify(run, map_adapter, "--against", lora, "--base", plain, "--against-base", nf4)
        assert same["kl"] <= 1e-9
        assert other["kl"] > 1e-4
        assert min(module["error"] for module in other["modules"]) > 1e-2
