"""A GGUF file where a base's folder may stand: what is made on it is what is made on its values, stored plain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.files import copy, edit_json, read_tensors
from tests.gguf_files import save_gguf
from tests.models import save_adapter, save_tokenizer
from tests.quantized import WEIGHTS, save_plain


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> tuple[Path, Path]:
    """(GGUF file with matrices in Q8_0, the same values in float32)."""
    folder = tmp_path_factory.mktemp("gguf")
    plain, twin, file = save_plain(folder / "plain"), folder / "twin", folder / "gguf" / "model-Q8_0.gguf"
    values = save_gguf(plain, file)
    twin.mkdir()
    save_file(values, twin / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    save_tokenizer(twin)
    return file, twin


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {name: save_adapter(bases[1], folder / name, use_dora=name == "dora") for name in ("lora", "dora")}
    for adapter in made.values():
        save_tokenizer(adapter)
    return made


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merge_and_upgrade(run, method, bases, adapters, tmp_path):
    for base, name in zip(bases, ("gguf", "twin"), strict=True):
        assert run("merge", adapters[method], "--base", base, "-o", tmp_path / name, "--dtype", "float32").status == 0
        assert run("upgrade", adapters[method], "--base", base, "-o", tmp_path / f"{name}-map").status == 0
    merged, expected = (read_tensors(tmp_path / name) for name in ("gguf", "twin"))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    found = [json.loads((tmp_path / f"{name}-map" / "map_config.json").read_text()) for name in ("gguf", "twin")]
    for key in ("alpha", "beta", "base_norm", "base_projection"):
        assert [module[key] for module in found[0]["modules"]] == [module[key] for module in found[1]["modules"]]


def test_the_merged_model_is_an_ordinary_one(run, bases, adapters, tmp_path):
    result = run("merge", adapters["lora"], "--base", bases[0], "-o", tmp_path / "out")
    assert result.status == 0, result.err
    assert "16 weights as GGUF Q8_0" in result.err
    assert "config.json is made of the metadata in model-Q8_0.gguf" in result.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "map_merge.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "map_merge.json").read_text())["base"]["name"] == str(bases[0])
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_shards_and_their_index(run, bases, adapters, tmp_path):
    out = tmp_path / "out"
    assert run("merge", adapters["lora"], "--base", bases[0], "-o", out, "--max-shard-size", "20KB").status == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert not any(AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)[1].values())


def test_live_runs(run, bases, adapters, tmp_path):
    """On the values of its blocks, with the tokenizer and configuration that lie beside the file."""
    file = copy(bases[0].parent, tmp_path / "gguf") / bases[0].name
    (file.parent / "config.json").write_text((bases[1] / "config.json").read_text())
    edit_json(file.parent / "config.json", dtype="bfloat16")
    save_tokenizer(file.parent)
    assert run("merge", adapters["lora"], "--base", file, "-o", tmp_path / "out", "--dtype", "float32").status == 0
    options = ("--against", adapters["lora"], "--base", file, "--samples", 1, "--json")
    result = run("verify", tmp_path / "out", *options)
    assert result.status == 0, result.err
    assert json.loads(result.out)["kl"] <= 1e-9
    assert json.loads(result.out)["kl_base"] > 1e-3


def test_inspect(run, bases, adapters):
    result = run("inspect", adapters["lora"], "--base", bases[0], "--json")
    found = json.loads(result.out)
    assert found["fits"] == str(bases[0])
    assert found["storages"] == {"GGUF F32": 5, "GGUF Q8_0": 16}


class TestRefused:
    def error(self, run, base, adapter, tmp_path, *options) -> str:
        result = run("merge", adapter, "--base", base, "-o", tmp_path / "out", *options)
        assert result.status == 1
        assert not (tmp_path / "out").exists()
        return result.err

    def test_copied_blocks(self, run, bases, adapters, tmp_path):
        assert "GGUF" in self.error(run, bases[0], adapters["lora"], tmp_path, "--quantized", "copy")

    def test_a_folder_with_files(self, run, bases, adapters, tmp_path):
        assert str(bases[0]) in self.error(run, bases[0].parent, adapters["lora"], tmp_path)

    def test_no_file(self, run, bases, adapters, tmp_path):
        assert "absent.gguf" in self.error(run, tmp_path / "absent.gguf", adapters["lora"], tmp_path)
