"""``mapconv push`` against the fake Hub, with the real client: what arrives, and what a user sees."""

from __future__ import annotations

import hashlib
import json
import os
import pty
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.fake_hub import FakeHub
from tests.hub.conftest import ADAPTER_FILES, BASE_ID, error_of, files_of


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
def test_a_terminal_is_asked_before_anything_is_sent(models, start, hub, answer, sent):
    controller, terminal = pty.openpty()
    words = ("push", models.dora_map, "me/asked", "--base-id", BASE_ID)
    process = start(hub, *words, stdin=os.ttyname(terminal))
    os.write(controller, answer)
    _, errors = process.communicate(timeout=30)
    os.close(controller)
    os.close(terminal)
    assert "Send this to me/asked?" in errors
    assert process.returncode == (0 if sent else 1)
    assert bool(hub.requests) is sent


def _last_line(done: CompletedProcess) -> str:
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
