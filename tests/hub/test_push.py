"""``mapconv push`` against the fake Hub, with the real client: what arrives, and what a user sees."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BASE_ID, QUICK, error_of, files_of, json_of
from fake_hub import FakeHub

import mapconv
from mapconv.commands.push import PushResult
from mapconv.errors import AdapterError, HubError

ADAPTER_FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "map_config.json", "scalars.png", ".gitattributes",
}  # fmt: skip


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_pushed_adapter_comes_back_the_same(models, run, python, tmp_path, xet):
    with FakeHub(tmp_path / "server", xet=xet) as hub:
        done = run(hub, "push", models.dora_map, "me/first", "--base-id", BASE_ID, "--quiet")
        assert f"{hub.url}/me/first" in done.stdout
        assert hub.store.repos["me/first"].resolve("main").sha in done.stdout
        assert set(hub.files("me/first")) == ADAPTER_FILES
        assert bool(hub.store.xet_hashes()) is xet
        code = "from huggingface_hub import snapshot_download; print(snapshot_download('me/first'))"
        folder = Path(_last_line(python(hub, code)))
        weights = "adapter_model.safetensors"
        assert (folder / weights).read_bytes() == (models.dora_map / weights).read_bytes()
        assert hub.files("me/first")[weights].sha256 == hashlib.sha256((folder / weights).read_bytes()).hexdigest()


def test_stock_libraries_load_what_was_pushed_by_its_name(models, run, python, hub):
    hub.repo(BASE_ID, files_of(models.base))
    run(hub, "push", models.dora_map, "me/peft", "--base-id", BASE_ID)
    run(hub, "push", models.merged, "me/merged", "--base-id", BASE_ID, "--license", "mit")
    code = _LOAD.format(base=BASE_ID, local=str(models.dora_map), remote="me/peft", merged="me/merged")
    result = json.loads(_last_line(python(hub, code)))
    assert result["update"] > 0.0
    assert result["difference"] == 0.0
    assert result["missing"] == []
    assert result["merged"] < 1e-4 * result["update"]
    assert result["tokens"] > 0


def test_the_card_loads_and_says_where_everything_comes_from(models, run, hub, tmp_path):
    run(hub, "push", models.lora_map, "me/card", "--base-id", BASE_ID)
    path = tmp_path / "README.md"
    path.write_bytes(hub.content("me/card", "README.md"))
    from huggingface_hub import ModelCard

    card = ModelCard.load(path)
    assert card.data.to_dict() == {
        "base_model": BASE_ID,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",  # of the base's card
        "language": ["en"],
        "datasets": ["lab/words"],
        "pipeline_tag": "text-generation",
        "tags": ["map", "lora"],
    }
    for part in ("PeftModel.from_pretrained", "mapconv merge me/card", "Not measured", "![", "W' = α·W0"):
        assert part in card.text
    picture = hub.content("me/card", "scalars.png")
    assert picture.startswith(b"\x89PNG")
    assert "(scalars.png)" in card.text
    assert [request.status for request in hub.log("POST", "validate-yaml")] == [200]


def test_a_merged_model_is_a_finetune_of_its_base(models, run, hub):
    run(hub, "push", models.merged, "me/merged", "--base-id", BASE_ID, "--license", "mit")
    card = hub.content("me/merged", "README.md").decode()
    assert "base_model_relation: finetune" in card
    assert "library_name: transformers" in card
    assert "license: mit" in card


def test_a_second_push_makes_no_commit_and_a_changed_one_sends_what_changed(models, run, hub):
    run(hub, "push", models.dora_map, "me/again", "--base-id", BASE_ID)
    first = hub.store.repos["me/again"].resolve("main").sha
    done = run(hub, "push", models.dora_map, "me/again", "--base-id", BASE_ID)
    assert "nothing to send" in done.stdout
    assert first in done.stdout
    assert len(hub.log("POST", "/commit/")) == 1
    run(hub, "push", models.dora_map, "me/again", "--base-id", BASE_ID, "--license", "mit")
    lines = [json.loads(line) for line in hub.log("POST", "/commit/")[1].body.splitlines()]
    assert [line["value"]["path"] for line in lines if line["key"] != "header"] == ["README.md"]
    assert len(hub.log("PUT", "/cdn/")) == 1


def test_pull_request_branch_and_message(models, run, hub):
    run(hub, "push", models.dora_map, "me/pr", "--base-id", BASE_ID)
    main = hub.store.repos["me/pr"].resolve("main").sha
    arguments = ("push", models.dora_map, "me/pr", "--base-id", BASE_ID, "--license", "mit")
    done = run(hub, *arguments, "--create-pr", "-m", "A better card")
    assert f"{hub.url}/me/pr/discussions/1" in done.stdout
    assert hub.store.repos["me/pr"].resolve("main").sha == main
    assert hub.store.repos["me/pr"].resolve("refs/pr/1").summary == "A better card"
    done = run(hub, *arguments, "--revision", "v2")
    assert f"{hub.url}/me/pr/tree/v2" in done.stdout
    assert b"license: mit" in hub.content("me/pr", "README.md", "v2")
    assert hub.store.repos["me/pr"].resolve("main").sha == main


def test_private_is_private_and_never_silently_public(models, run, hub):
    run(hub, "push", models.dora_map, "me/hidden", "--base-id", BASE_ID, "--private")
    assert hub.store.repos["me/hidden"].readers == {"me"}
    run(hub, "push", models.dora_map, "me/hidden", "--base-id", BASE_ID, "--private", "--license", "mit")
    hub.repo("me/shown")
    done = run(hub, "push", models.dora_map, "me/shown", "--base-id", BASE_ID, "--private", status=1)
    assert "is public" in error_of(done)
    assert "adapter_config.json" not in hub.files("me/shown")


def test_json_output_is_the_result_and_nothing_else(models, run, hub):
    done = run(hub, "push", models.dora_map, "me/json", "--base-id", BASE_ID, "--json")
    table = json.loads(done.stdout)
    assert table["commit"] == hub.store.repos["me/json"].resolve("main").sha
    assert table["changed"] is True
    assert table["created"] is True
    assert {file["name"] for file in table["files"]} == ADAPTER_FILES - {".gitattributes"}
    sizes = {name: blob.size for name, blob in hub.files("me/json").items()}
    assert {file["name"]: file["nbytes"] for file in table["files"]}.items() <= sizes.items()


def test_a_dry_run_opens_no_connection(models, run, hub):
    done = run(hub, "push", models.dora_map, "me/dry", "--base-id", BASE_ID, "--dry-run")
    assert "adapter_model.safetensors" in done.stdout
    assert hub.requests == []
    assert hub.connections == 0
    table = json.loads(run(hub, "push", models.dora_map, "me/dry", "--base-id", BASE_ID, "--dry-run", "--json").stdout)
    assert table["dry_run"] is True
    assert table["commit"] is None
    assert hub.connections == 0


@pytest.mark.parametrize(("answer", "sent"), [(b"n\n", False), (b"y\n", True)])
def test_a_terminal_is_asked_before_anything_is_sent(models, hub, tmp_path, answer, sent):
    command = [sys.executable, "-c", QUICK, "push", str(models.dora_map), "me/asked", "--base-id", BASE_ID]
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        command, env=hub.environment(tmp_path / "home"), stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        os.write(controller, answer)
        _, errors = process.communicate(timeout=30)
    os.close(controller)
    os.close(terminal)
    assert b"Send this to me/asked?" in errors
    assert process.returncode == (0 if sent else 1)
    assert bool(hub.requests) is sent


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
    with pytest.raises(HubError, match="symbolic link"):
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
        (tmp_path / "absent", "no folder"),
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


def _last_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


_LOAD = """
import json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens = torch.arange(1, 40)[None]
base = AutoModelForCausalLM.from_pretrained("{base}")
before = base(tokens).logits
model = PeftModel.from_pretrained(base, {local!r}, adapter_name="local")
local = model(tokens).logits
model.load_adapter("{remote}", "remote")
model.set_adapter("remote")
remote = model(tokens).logits
merged, report = AutoModelForCausalLM.from_pretrained("{merged}", output_loading_info=True)
def distance(logits):
    return float((local - logits).abs().max())
print(json.dumps(dict(
    difference=distance(remote), update=distance(before), merged=distance(merged(tokens).logits),
    missing=sorted(report["missing_keys"]), tokens=len(AutoTokenizer.from_pretrained("{merged}")),
)))
"""
