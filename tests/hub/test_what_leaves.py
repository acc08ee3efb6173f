"""What leaves this machine: files of an allow-list, no local path, and the user's own text beside the card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import mapconv
from mapconv.commands.push import PushResult
from mapconv.errors import AdapterError, HubError
from tests.hub.conftest import ADAPTER_FILES, BASE_ID, error_of, json_of


def test_only_files_that_mapconv_knows_are_sent(models, run, hub, tmp_path):
    folder = shutil.copytree(models.dora_map, tmp_path / "result")
    (tmp_path / "secret.txt").write_text("PLANTED secret")
    for name in (
        ".env",
        "optimizer.pt",
        "training_args.bin",
        "notes.txt",
        "events.out.tfevents.1",
        "model.safetensors",
    ):
        (folder / name).write_text(f"PLANTED {name}")
    (folder / "link.json").symlink_to(tmp_path / "secret.txt")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_text("PLANTED bytecode")
    done = run(hub, "push", folder, "me/clean", "--base-id", BASE_ID)
    assert set(hub.files("me/clean")) == ADAPTER_FILES
    assert not any(b"PLANTED" in request.body for request in hub.requests)
    for name in (".env", "optimizer.pt", "link.json", "__pycache__/"):
        assert name in done.stderr


def test_a_link_in_the_place_of_one_of_our_files_is_refused(models, tmp_path):
    folder = shutil.copytree(models.dora_map, tmp_path / "result")
    (tmp_path / "elsewhere.json").write_text('{"secret": 1}')
    (folder / "tokenizer_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(AdapterError, match="symbolic link"):
        _plan(folder)


def test_no_local_path_leaves(models, run, hub, tmp_path):
    """Byte search in all that was sent; the local record has the paths, so the search can find them."""
    assert str(models.base).encode() in (models.dora_map / "map_config.json").read_bytes()
    for folder, name in ((models.dora_map, "me/a"), (models.merged, "me/b")):
        run(hub, "push", folder, name, "--base-id", BASE_ID)
    marks = [str(models.folder).encode(), models.folder.name.encode(), b"/tmp/"]
    for request in hub.requests:
        assert not any(mark in request.body for mark in marks), request.path
    for name in ("me/a", "me/b"):
        for path in hub.files(name):
            assert not any(mark in hub.content(name, path) for mark in marks), path
    config = json_of(hub.content("me/a", "adapter_config.json"))
    assert config["base_model_name_or_path"] == BASE_ID
    assert json_of(hub.content("me/a", "map_config.json"))["base"]["name"] == BASE_ID


def test_a_base_without_a_name_on_the_hub_is_refused_before_any_connection(models, run, hub):
    message = error_of(run(hub, "push", models.dora_map, "me/x", status=1))
    assert "--base-id" in message
    assert hub.connections == 0


def test_the_base_name_is_found_in_the_bases_own_configuration(models, run, hub, tmp_path):
    base = shutil.copytree(models.base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"_name_or_path": BASE_ID}
    (base / "config.json").write_text(json.dumps(config))
    run(hub, "upgrade", models.lora, "-o", tmp_path / "result", "--base", base, "--quiet")
    run(hub, "push", tmp_path / "result", "me/found")
    assert json_of(hub.content("me/found", "adapter_config.json"))["base_model_name_or_path"] == BASE_ID


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("adapter_config.json", {"corda_config": {"cache_file": "/data/private/cache"}}, "corda_config.cache_file"),
        ("tokenizer_config.json", {"vocab_file": "~/models/vocab.json"}, "vocab_file"),
        ("tokenizer_config.json", {"extra": ["C:\\Users\\me\\x"]}, "extra.0"),
    ],
)
def test_a_path_that_cannot_be_rewritten_stops_the_push(models, tmp_path, name, change, named):
    folder = shutil.copytree(models.dora_map, tmp_path / "result")
    table = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(table | change))
    with pytest.raises(HubError, match=named):
        _plan(folder)


def test_a_path_in_the_weights_metadata_stops_the_push(models, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models.dora_map, tmp_path / "result")
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "trained_in": "/home/me/run7"})
    with pytest.raises(HubError, match="trained_in"):
        _plan(folder)


def test_own_text_in_the_readme_is_kept_on_the_hub_and_from_the_folder(models, run, hub, tmp_path):
    arguments = ("me/text", "--base-id", BASE_ID)
    folder = shutil.copytree(models.dora_map, tmp_path / "result")
    run(hub, "push", folder, *arguments)
    written = hub.content("me/text", "README.md").decode()
    edited = written.replace("tags:\n", "tags:\n- poems\n", 1) + "\n## Mine\n\nHow I trained it.\n"
    hub.store.add_files(hub.store.repos["me/text"], {"README.md": edited.encode()})
    run(hub, "push", folder, *arguments, "--license", "mit")
    kept = hub.content("me/text", "README.md").decode()
    assert kept.rstrip().endswith("How I trained it.")
    assert "- poems" in kept
    assert "license: mit" in kept
    assert kept.count("mapconv:begin") == 1
    assert "nothing to send" in run(hub, "push", folder, *arguments, "--license", "mit").stdout

    local = (folder / "README.md").read_text()
    (folder / "README.md").write_text(local + "\nWritten in the folder.\n")
    run(hub, "push", folder, *arguments, "--license", "mit")
    assert b"Written in the folder." in hub.content("me/text", "README.md")


def test_text_that_was_edited_on_both_sides_is_not_lost(models, run, hub, tmp_path):
    folder = shutil.copytree(models.dora_map, tmp_path / "result")
    run(hub, "push", folder, "me/both", "--base-id", BASE_ID)
    remote = hub.content("me/both", "README.md") + b"\nEdited there.\n"
    hub.store.add_files(hub.store.repos["me/both"], {"README.md": remote})
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nEdited here.\n")
    message = error_of(run(hub, "push", folder, "me/both", "--base-id", BASE_ID, status=1))
    assert "edited on the Hub and in the local folder" in message
    assert hub.content("me/both", "README.md") == remote


@pytest.mark.parametrize(
    ("front", "named"),
    [
        ("license: Apache 2.0", "license"),
        ("tags: [a, 3]", "tags"),
        ("dataset_path: /home/me/data", "dataset_path"),
        ("a: [unclosed", "not YAML"),
    ],
)
def test_a_card_that_the_hub_would_refuse_is_refused_here(models, tmp_path, front, named):
    folder = shutil.copytree(models.dora_map, tmp_path / "result")
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Mine\n")
    with pytest.raises(HubError, match=named):
        _plan(folder)


def test_what_is_no_result_of_mapconv_is_refused_by_name(models, run, hub, tmp_path):
    for folder, words in (
        (models.dora, "mapconv upgrade"),
        (models.base, "neither"),
        (tmp_path / "absent", "is not a folder"),
    ):
        with pytest.raises(AdapterError, match=words):
            _plan(folder)
    with pytest.raises(HubError, match="owner/name"):
        mapconv.push(models.dora_map, "just-a-name", base_id=BASE_ID, dry_run=True)
    assert "mapconv upgrade" in error_of(run(hub, "push", models.dora, "me/x", "--base-id", BASE_ID, status=1))
    assert run(hub, "push", models.dora_map, status=2).stderr
    assert hub.connections == 0


def _plan(folder: Path) -> PushResult:
    return mapconv.push(folder, "me/x", base_id=BASE_ID, dry_run=True)
