"""Strings that may leave this machine, and those that may not."""

from __future__ import annotations

import json
import shutil

import pytest

import mapconv
from mapconv.errors import HubError
from mapconv.metadata.public import first_private, is_public
from tests.hub.conftest import BASE_ID

PATHS = [
    "/home/me/x", " /home/x", "/home/x\n", "--data /home/x", "--data=/home/x", "//server/x", "~/x", "~me/x", "~me",
    "./x", "../x", "..\\x", "C:\\x", "D:/x", "\\\\server\\x", "file:///x", "FILE:///x", "/mnt/my data/x",
    "data/train.json", "see (/home/x)", "s3://bucket/x", "http://localhost:8000/x", "https://build.corp/x", "https://10.0.0.1/x",
    "ssh://a.org/x", "https://user:word@a.org/x", "https://a.org/x /home/x", "</home/me>/x", "[/home/me/x]",
]  # fmt: skip


@pytest.mark.parametrize("value", PATHS)
def test_what_may_be_a_path_is_private_as_a_value_and_as_a_name(value):
    assert not is_public(value)
    assert first_private({"a": [{"b": value}]}) == ("a.0.b", value)
    assert first_private({"a": {value: 1}}) == ("a.(name)", value)


@pytest.mark.parametrize(
    "value",
    ["q_proj", "", "/", "//", "</s>", "[/INST]", "<|/im|>", "a b", "https://x.org/y",
     "see https://a.b.org/x?y#z for more", "bfloat16", "a~b", "1.5", "ünïcode", "model-00001-of-00002.safetensors"],
)  # fmt: skip
def test_what_is_public_anywhere(value):
    assert is_public(value)


@pytest.mark.parametrize(
    "table",
    [
        {"_name_or_path": "owner/name"},
        {"text_config": {"_name_or_path": "owner/name"}},
        {"auto_map": {"AutoConfig": "configuration_x.Config", "AutoModel": "owner/name--modeling_x.Model"}},
        {"auto_map": {"AutoTokenizer": ["tokenization_x.Slow", None]}},
        {"datasets": ["owner/words"]},
        {"id2label": {"0": "N/A", "1": "and/or"}, "label2id": {"N/A": 0, "and/or": 1}},
        {"chat_template": "{% for m in messages %}</s>/home/{{ m }}\\n{% endfor %}"},
        {"chat_template": [{"name": "tool/use", "template": "a/b"}]},
        {"eos_token": "/end", "pad_token": {"content": "\\pad"}, "additional_special_tokens": ["<a/b>"]},
        {"target_modules": r"model\.layers\.\d+\.(q|v)_proj", "rank_pattern": {r".*\.q_proj": 4}},
        {"license_link": "https://huggingface.co/owner/name/blob/main/LICENSE"},
    ],
)
def test_what_is_public_in_its_field(table):
    assert first_private(table) is None


@pytest.mark.parametrize(
    "table",
    [
        {"name": "owner/name"},
        {"_name_or_path": "/home/me/x"},
        {"_name_or_path": "owner/name/more"},
        {"_name_or_path": "tests/hub"},
        {"auto_map": {"AutoConfig": "/home/x--a.B"}},
        {"target_modules": "..\\x"},
        {"target_modules": ["/home/x"]},
    ],
)
def test_what_is_private_in_its_field(table, monkeypatch):
    from tests.hub.conftest import ROOT

    monkeypatch.chdir(ROOT)  # where tests/hub is a folder
    assert first_private(table) is not None


def test_names_that_the_push_itself_says_are_public_wherever_they_stand():
    known = {"lab/tiny", "artist/poems"}
    assert first_private({"tags": ["base_model:adapter:lab/tiny", "lab/tiny"], "x": "of artist/poems"}, known) is None
    assert first_private({"tags": ["base_model:adapter:lab/other"]}, known) is not None
    assert first_private({"tags": ["/home/lab/tiny"]}, known) is not None


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("model.safetensors.index.json", {"metadata": {"trained_in": "/home/me/x"}}, "metadata.trained_in"),
        ("config.json", {"/home/me/x": 1}, "(name)"),
        ("config.json", {"command": "train --data /home/me/x"}, "command"),
        ("generation_config.json", {"note": "//server/x"}, "note"),
    ],
)
def test_each_file_of_a_merged_model_is_held_to_it(models, tmp_path, file, change, named):
    folder = shutil.copytree(models.merged, tmp_path / "merged")
    if file.endswith("index.json"):
        shutil.rmtree(folder)
        mapconv.merge(models.dora_map, folder, base=models.base, max_shard_size=100_000)
    table = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(table | change))
    with pytest.raises(HubError, match="may name a place on this machine") as caught:
        mapconv.push(folder, "me/x", base_id=BASE_ID, dry_run=True)
    assert named in str(caught.value)


def test_where_a_tokenizer_was_loaded_from_is_left_out(models, run, hub, tmp_path):
    folder = shutil.copytree(models.merged, tmp_path / "merged")
    table = json.loads((folder / "tokenizer_config.json").read_text())
    table |= {
        "tokenizer_file": "/home/me/.cache/x",
        "special_tokens_map_file": "/content/x",
        "name_or_path": "/home/me/x",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
    run(hub, "push", folder, "me/clean", "--base-id", BASE_ID)
    sent = json.loads(hub.content("me/clean", "tokenizer_config.json"))
    assert sent["name_or_path"] == BASE_ID
    assert not {"tokenizer_file", "special_tokens_map_file"} & sent.keys()
