"""Names on the Hub in place of folders: what is fetched, what is recorded, and what a user reads when it fails."""

from __future__ import annotations

import json

import pytest

from mapconv.commands.outputs import output_beside
from mapconv.errors import AdapterError
from mapconv.formats import read_adapter
from mapconv.hub.locate import locate_adapter
from mapconv.hub.reference import HubReference, origin_of, parse_reference
from tests.fake_hub import READ_TOKEN
from tests.hub.conftest import BASE_ID, adapter_files, error_of, files_of, json_of


@pytest.fixture
def published(models, hub):
    """The base and a DoRA adapter on the fake Hub, as two other users published them."""
    base = hub.repo(BASE_ID, files_of(models.base))
    adapter = hub.repo("artist/poems", adapter_files(models.dora, BASE_ID) | {"README.md": b"---\nlicense: mit\n---\n"})
    return base, adapter


def test_upgrade_verify_merge_and_push_by_name(models, run, hub, published, tmp_path):
    base, adapter = published
    out = tmp_path / "poems-map"
    run(hub, "upgrade", "artist/poems", "-o", out, "--quiet")
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (models.dora_map / weights).read_bytes()
    record = json_of((out / "map_config.json").read_bytes())
    assert (record["base"]["name"], record["base"]["revision"]) == (BASE_ID, base.branches["main"])
    assert (record["source"]["name"], record["source"]["revision"]) == ("artist/poems", adapter.branches["main"])
    config = json_of((out / "adapter_config.json").read_bytes())
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE_ID, base.branches["main"])

    # The base moves on; what was pinned stays pinned.
    hub.store.add_files(base, {"config.json": b"{}", "model.safetensors": b"other"})
    pinned = f"{BASE_ID}@{config['revision']}"
    done = run(hub, "verify", out, "--against", "artist/poems", "--base", pinned, "--save", "--json", "--quiet")
    report, stored = json.loads(done.stdout), json_of((out / "verify.json").read_bytes())
    for key in ("kl", "tokens", "modules"):
        assert stored[key] == report[key]
    run(hub, "push", out, "me/poems-map")
    card = hub.content("me/poems-map", "README.md").decode()
    for line in (f"base_model: {BASE_ID}", "source_adapter: artist/poems", "license: mit", adapter.branches["main"]):
        assert line in card
    assert "Not measured" not in card
    assert "KL(source ‖ model)" in card

    run(hub, "merge", "me/poems-map", "-o", tmp_path / "merged", "--quiet")
    name = "model.safetensors"
    assert (tmp_path / "merged" / name).read_bytes() == (models.merged / name).read_bytes()
    merged = json_of((tmp_path / "merged" / "map_merge.json").read_bytes())
    assert merged["source"]["revision"] == hub.store.repos["me/poems-map"].branches["main"]
    assert merged["source"]["source"]["name"] == "artist/poems"


@pytest.mark.parametrize("name", ["artist/many@v1:french/short", "artist/many/french/short@v1"])
def test_a_revision_and_a_subfolder(models, run, hub, tmp_path, name):
    hub.repo(BASE_ID, files_of(models.base))
    files = {f"french/short/{path}": data for path, data in adapter_files(models.lora, BASE_ID).items()}
    repo = hub.repo("artist/many", files)
    repo.branches["v1"] = repo.branches["main"]
    hub.store.add_files(repo, {"french/short/adapter_model.safetensors": b"broken since"})
    run(hub, "upgrade", name, "-o", tmp_path / "out", "--quiet")
    source = json_of((tmp_path / "out" / "map_config.json").read_bytes())["source"]
    assert (source["name"], source["revision"]) == ("artist/many/french/short", repo.branches["v1"])


def test_only_needed_files_are_fetched(models, run, hub, published, tmp_path):
    base, adapter = published
    waste = {
        "consolidated.safetensors": b"x" * 99,
        "pytorch_model.bin": b"x",
        "onnx/model.onnx": b"x",
        "sub/config.json": b"{}",
    }
    hub.store.add_files(base, waste)
    hub.store.add_files(
        adapter, {"optimizer.pt": b"x", ".env": b"x", "runs/log.txt": b"x", "checkpoint-5/README.md": b"x"}
    )
    run(hub, "merge", "artist/poems", "-o", tmp_path / "merged", "--quiet")
    fetched = {request.path.partition("/resolve/")[2].partition("/")[2] for request in hub.requests}
    assert fetched - {""} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_inspect_reads_a_bases_header_alone(models, run, hub, published):
    done = run(hub, "inspect", "artist/poems", "--base", BASE_ID)
    assert "every tensor fits" in done.stdout
    ranges = [r for r in hub.log("GET", "/cdn/") if "range" in map(str.lower, r.headers)]
    assert 0 < sum(request.sent for request in ranges) <= 64 << 10
    assert not [r for r in hub.log("GET", f"{BASE_ID}/resolve/.*safetensors") if r not in ranges and r.status == 200]


def test_offline_uses_what_was_fetched_and_says_what_was_not(models, run, hub, published, tmp_path):
    cold = run(hub, "upgrade", "artist/poems", "-o", tmp_path / "a", status=1, HF_HUB_OFFLINE="1")
    assert "artist/poems is not in the local cache" in error_of(cold)
    assert "HF_HUB_OFFLINE" in error_of(cold)
    run(hub, "upgrade", "artist/poems", "-o", tmp_path / "a", "--quiet")
    before = hub.connections
    run(hub, "upgrade", "artist/poems", "-o", tmp_path / "b", "--quiet", HF_HUB_OFFLINE="1")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    partly = run(hub, "merge", "artist/poems", "-o", tmp_path / "c", status=1, HF_HUB_OFFLINE="1")
    assert BASE_ID in error_of(partly)
    assert "only partly in the local cache" in error_of(partly)
    assert "--base" in error_of(partly)
    assert hub.connections == before


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("artist/absent", None, ["artist/absent is not a folder here and not on the Hub", "401"]),
        ("artist/absent", READ_TOKEN, ["neither a folder here nor a repository", "404"]),
        ("artist/hidden", READ_TOKEN, ["neither a folder here nor a repository", "404"]),
        ("artist/gated", READ_TOKEN, ["artist/gated is gated", "request access", "HF_TOKEN"]),
        ("artist/gated", None, ["artist/gated is gated"]),
        ("artist/poems", "hf_unknown", ["does not accept the token", "401"]),
        ("artist/poems@v9", None, ["artist/poems@v9 has no such branch, tag or commit"]),
        ("artist/pickle", None, ["pickle", "adapter_model.bin"]),
        ("artist/many", None, ["its folders do", "artist/many:a", "artist/many:b"]),
        ("lab/tiny-llama", None, ["it is not an adapter's repository"]),
        ("./artist/poems", None, ["does not exist"]),
        ("/absolute/poems", None, ["does not exist"]),
    ],
)
def test_what_cannot_be_had_is_one_sentence(models, run, hub, published, name, token, words):
    files = adapter_files(models.lora, BASE_ID)
    hub.repo("artist/hidden", files, readers={"artist"})
    hub.repo("artist/gated", files, readers={"artist"}, gated=True)
    hub.repo("artist/pickle", {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"x"})
    hub.repo("artist/many", {f"{place}/adapter_config.json": b"{}" for place in "ab"})
    message = error_of(run(hub, "inspect", name, status=1, token=token))
    for word in words:
        assert word in message


def test_a_hub_in_trouble_is_one_sentence(models, run, hub, published):
    hub.fault("GET", "/api/models/artist/poems", status=503, times=9)
    assert "trouble (503) with artist/poems" in error_of(run(hub, "inspect", "artist/poems", status=1))
    gone = run(hub, "inspect", "artist/poems", status=1, HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be reached (ConnectError)" in error_of(gone)


def test_a_private_adapter_is_read_with_its_owners_token(models, run, hub):
    hub.repo("me/private", adapter_files(models.lora, BASE_ID), readers={"me"})
    assert "LoRA adapter" in run(hub, "inspect", "me/private", token=READ_TOKEN).stdout


def test_the_base_may_be_named_with_a_revision(models, run, hub, tmp_path):
    base = hub.repo(BASE_ID, files_of(models.base))
    base.branches["v1"] = base.branches["main"]
    hub.store.add_files(base, {"config.json": b"{}"})
    run(hub, "upgrade", models.lora, "-o", tmp_path / "out", "--base", f"{BASE_ID}@v1", "--quiet")
    record = json_of((tmp_path / "out" / "map_config.json").read_bytes())["base"]
    assert (record["name"], record["revision"]) == (BASE_ID, base.branches["v1"])


def test_a_folder_of_that_name_wins(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artist").mkdir()
    (tmp_path / "artist" / "poems").symlink_to(models.lora)
    assert read_adapter(locate_adapter("artist/poems")).method == "LoRA"
    with pytest.raises(AdapterError, match="does not exist"):
        read_adapter(locate_adapter("just-one-word"))


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("gpt2", HubReference("gpt2")),
        ("a/b", HubReference("a/b")),
        ("a/b@main", HubReference("a/b", "main")),
        ("a/b@refs/pr/1", HubReference("a/b", "refs/pr/1")),
        ("a/b:c", HubReference("a/b", None, "c")),
        ("a/b/c/d", HubReference("a/b", None, "c/d")),
        ("a/b/c@v1:d", HubReference("a/b", "v1", "c/d")),
        ("a/b/../c", None),
        ("a/b:../c", None),
        ("/a/b", None),
        ("./a/b", None),
        ("../a", None),
        ("~/a", None),
        ("a//b", None),
        ("a/b@", None),
        ("C:\\a\\b", None),
        ("a b/c", None),
        ("a/b--c", None),
        ("", None),
    ],
)
def test_references(text, reference):
    assert parse_reference(text) == reference
    if reference is not None:
        assert parse_reference(str(reference)) == reference


def test_origin_of_a_cache_folder(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "models--a--b" / "snapshots" / commit
    assert origin_of(folder) == HubReference("a/b", commit)
    assert origin_of(folder / "c" / "d") == HubReference("a/b", commit, "c/d")
    assert origin_of(folder.parent / "main") is None
    assert origin_of(tmp_path / "snapshots" / commit) is None


def test_the_default_output_of_a_name_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(output_beside("artist/poems@v1", "map")) == "poems-map"
    assert str(output_beside("artist/many:french/short", "map")) == "short-map"
    (tmp_path / "artist" / "poems").mkdir(parents=True)
    assert str(output_beside("artist/poems", "map")) == "artist/poems-map"


def test_the_base_that_a_configuration_names_keeps_its_revision(models, run, hub, tmp_path):
    """PEFT's ``revision`` field is the base's."""
    base = hub.repo(BASE_ID, files_of(models.base))
    first = base.branches["main"]
    hub.store.add_files(base, {"config.json": b"{}"})
    hub.repo("artist/pinned", adapter_files(models.lora, BASE_ID, revision=first))
    run(hub, "upgrade", "artist/pinned", "-o", tmp_path / "out", "--quiet")
    assert json.loads((tmp_path / "out" / "map_config.json").read_text())["base"]["revision"] == first
