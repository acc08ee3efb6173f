"""Files that are small and harm all the same: one sentence, and neither minutes nor gigabytes."""

from __future__ import annotations

import json
import os
import pickle
import zipfile

import pytest
import torch

import mapconv
from mapconv.catalog.reading import read_catalog
from mapconv.checkpoint.headers import read_tensor_file
from mapconv.checkpoint.model_config import read_model_config
from mapconv.errors import AdapterError, CatalogError, CheckpointError, HubError, MapconvError, sentence
from mapconv.jsonfile import MOST_NESTING, read_object
from mapconv.metadata.card import card_facts
from mapconv.metadata.readme import parse_readme
from mapconv.placement import skeleton
from mapconv.placement.skeleton import LiveModel
from mapconv.runtime.models import attach_with_peft, load_model
from mapconv.untrusted.schema import COUNT, NULL, NUMBER, TEXT, Each, fault, with_nulls
from tests.files import edit_json, write_header

FRONTS = (
    "date: 2023-02-30", "x: !!bool maybe", "x: " + "[" * 3000, "x: !!int y", "x: !!timestamp y", "x: 0x" + "f" * 9000,
    "a: &a [1]\nb: *a", "x: !!python/name:os.system", "x: !!float y", "? [a]\n: b", "- a", "x: {" * 200, "\x00",
)  # fmt: skip


@pytest.mark.parametrize("front", FRONTS)
def test_a_strangers_card_says_nothing_and_ones_own_is_refused(front, own_lora, tmp_path):
    text = f"---\n{front}\n---\n# Words\n"
    (own_lora / "README.md").write_text(text)
    assert card_facts(own_lora) == {}
    try:
        parse_readme(text, "README.md")
    except HubError as error:
        message = str(error)
    else:
        message = "README.md"  # a table with a date or an odd key is one
    assert message.startswith("README.md")


def test_an_upgrade_passes_over_a_strangers_broken_card(own_lora, tmp_path):
    (own_lora / "README.md").write_text("---\ndate: 2023-02-30\nx: !!bool maybe\n---\n")
    assert mapconv.upgrade(own_lora, tmp_path / "map").plan.modules == 14


def test_tens_of_thousands_of_marks():
    text = "<!-- mapconv:begin own=x -->\n" * 50_000
    assert parse_readme(text, "x").recorded is None
    assert parse_readme("<!-- mapconv:begin own=" * 50_000, "x").recorded is None
    assert parse_readme(f"{text}<!-- mapconv:end -->", "x").recorded == "x"


@pytest.mark.parametrize("depth", [MOST_NESTING, MOST_NESTING + 1])
def test_json_nests_so_deep_and_no_deeper(depth, tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": ' * (depth - 1) + "{}" + "}" * (depth - 1))
    if depth <= MOST_NESTING:
        assert read_object(path, AdapterError)
    else:
        with pytest.raises(AdapterError, match="nests deeper than 64 levels"):
            read_object(path, AdapterError)


def test_half_a_character_in_json(tmp_path):
    (tmp_path / "a.json").write_text(r'{"a": "\ud800"}')
    with pytest.raises(AdapterError, match="half a surrogate pair"):
        read_object(tmp_path / "a.json", AdapterError)
    (tmp_path / "a.json").write_text(r'{"a": "\ud83d\ude00 é"}')
    assert read_object(tmp_path / "a.json", AdapterError) == {"a": "😀 é"}


def test_a_schema_names_the_field():
    schema = {"kl": (NUMBER, NULL), "modules": [{"path": TEXT, "rank": COUNT}], "names": (Each(TEXT), NULL)}
    good = {"modules": [{"path": "a", "rank": 1, "more": []}], "other": {}}
    assert fault(good, schema) is None
    assert fault(good | {"kl": True}, schema) == "kl is true, expected a number or null"
    assert fault(good | {"kl": 10**400}, schema).startswith("kl is 1000")
    assert fault(good | {"names": {"a": 1}}, schema) == 'names is {"a": 1}, expected a table or null'
    assert fault({"modules": [{"path": "a", "rank": -1}]}, schema) == (
        "modules[0].rank is -1, expected a whole number of at least 0"
    )
    assert fault({}, schema) == "modules is null, expected a list"
    filled = {"kl": None, "names": None, "modules": [{"path": "a", "rank": 1, "more": []}], "other": {}}
    assert with_nulls(good, schema) == filled


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": 1.5}, {"architectures": [1]}, {"num_labels": 10**8}, {"n_layer": 10**7},
        {"text_config": {"num_hidden_layers": 10**7}}, {"depths": [2, 10**7]}, {"model_type": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_model_configuration_beyond_any_model(change, own_base, own_lora):
    edit_json(own_base / "config.json", **change)
    with pytest.raises(CheckpointError, match=next(iter(change))):
        read_model_config(own_base)
    with pytest.raises(MapconvError, match=r"config\.json"):
        mapconv.inspect(own_lora, base=own_base)


def test_sizes_that_real_models_have(own_base):
    edit_json(own_base / "config.json", vocab_size_per_layer_input=262144, max_position_embeddings=10**7)
    assert read_model_config(own_base)["vocab_size_per_layer_input"] == 262144


def test_counts_that_multiply(own_base, monkeypatch):
    monkeypatch.setattr(skeleton, "_MOST_MODULES", 20)
    config = json.loads((own_base / "config.json").read_text()) | {"num_hidden_layers": 9}  # not built before
    with pytest.raises(CheckpointError, match="more than 20 modules"):
        LiveModel(config, "LlamaForCausalLM")


def test_targets_that_peft_would_match_for_ever(base, own_lora):
    edit_json(own_lora / "adapter_config.json", target_modules=r"([\w.]+\d*)+!")
    model = load_model(base, dtype="float32", device="cpu")
    with pytest.raises(AdapterError, match=r"adapter_config\.json: target_modules has .*repetition inside repetition"):
        attach_with_peft(model, own_lora, "hostile")


def test_links_in_a_circle(own_lora, tmp_path):
    folder = tmp_path / "all"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "up").symlink_to(folder)
    (folder / "a" / "again").symlink_to(folder / "a")
    os.symlink(own_lora, folder / "a" / "adapter")
    os.symlink(own_lora, folder / "other-name")
    assert [entry.name for entry in read_catalog(folder)] == ["a/adapter", "other-name"]


def test_links_that_multiply(tmp_path, monkeypatch):
    monkeypatch.setattr("mapconv.catalog.reading._MOST_FOLDERS", 50)
    for level in range(12):
        (tmp_path / "levels" / str(level)).mkdir(parents=True)
        for name in ("a", "b") if level else ():
            (tmp_path / "levels" / str(level - 1) / name).symlink_to(tmp_path / "levels" / str(level))
    with pytest.raises(CatalogError, match="more than 50 folders"):
        read_catalog(tmp_path / "levels" / "0")


@pytest.mark.parametrize("value", ["!!bool maybe", "2023-02-30", "0x" + "f" * 9000, "!!int x", "[" * 500, "*a"])
def test_values_of_a_catalog(value, tmp_path):
    path = tmp_path / "catalog.yaml"
    path.write_text(f"adapters:\n- source: a\n  upgrade: {{rank: {value}}}\n")
    with pytest.raises(CatalogError, match=r"line [34]: (not|anchors)"):
        read_catalog(path)


def test_a_name_that_is_no_name(tmp_path):
    path = tmp_path / "model.safetensors"
    write_header(path, {"x" * 1001: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    with pytest.raises(CheckpointError, match="has 1,001 characters"):
        read_tensor_file(path)


def test_a_pickle_that_expands(own_lora):
    (own_lora / "adapter_model.safetensors").unlink()
    weights = own_lora / "adapter_model.bin"
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, weights)
    with pytest.raises(AdapterError, match="repeat the same few numbers"):
        mapconv.inspect(own_lora, allow_pickle=True)
    with zipfile.ZipFile(weights, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(10**7))
    weights.rename(own_lora / "x")
    other = own_lora.parent / "other"
    own_lora.rename(other)
    (other / "x").rename(other / "adapter_model.bin")
    with pytest.raises(AdapterError, match="expands to 10,000"):
        mapconv.inspect(other, allow_pickle=True)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), OSError(12, "Cannot allocate memory"),
        ImportError("x.so: failed to map segment from shared object"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried to …"),
        torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't start new thread"),
    ],
)  # fmt: skip
def test_memory(error):
    assert sentence(error).startswith("out of memory:")
