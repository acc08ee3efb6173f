"""A catalog whose results go to the Hub, and the example that converts, checks and publishes a folder."""

from __future__ import annotations

import json
import shutil

from tests.hub.conftest import BASE_ID, ROOT, adapter_files, files_of


def test_the_example_opens_a_pull_request_for_each(models, python, hub, tmp_path):
    hub.repo(BASE_ID, files_of(models.base))
    for name in ("lora", "dora", "broken"):
        folder = tmp_path / "adapters" / name
        folder.mkdir(parents=True)
        for file, data in adapter_files(models.dora if name == "dora" else models.lora, BASE_ID).items():
            (folder / file).write_bytes(data)
    (tmp_path / "adapters" / "broken" / "adapter_model.safetensors").write_bytes(b"")
    code = (ROOT / "examples" / "convert_folder.py").read_text()
    words = [tmp_path / "adapters", tmp_path / "out", "--to", "me", "--license", "mit", "--max-kl", "1"]
    done = python(hub, code, *words)
    assert done.returncode == 1, done.stderr
    assert "2 of 3 converted, 1 failed" in done.stdout
    assert "broken: CheckpointError" in done.stdout
    assert done.stdout.count("/discussions/") == 2, done.stdout
    assert "me/lora-map" in done.stdout
    assert {"me/lora-map", "me/dora-map"} <= hub.store.repos.keys()
    assert "me/broken-map" not in hub.store.repos


def test_push_to_publishes_what_was_converted_and_a_second_run_sends_nothing(models, run, hub, tmp_path):
    hub.repo(BASE_ID, files_of(models.base))
    hub.repo("artist/poems", adapter_files(models.lora, BASE_ID))
    shutil.copytree(models.lora, tmp_path / "songs")
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(
        "defaults: {push: {private: true, license: mit}}\n"
        f"adapters:\n- source: artist/poems\n- {{source: songs, base: {BASE_ID}}}\n"
    )
    first = run(hub, "catalog", "run", catalog, "-o", tmp_path / "out", "--push-to", "me")
    assert "2 done" in first.stdout
    assert hub.content("me/poems", "map_config.json")
    assert hub.content("me/songs", "map_config.json")
    lines = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()[1:]]
    assert all("me/" in line["pushed"] for line in lines)
    assert [line["base"] for line in lines] == [f"{BASE_ID}@{hub.store.repos[BASE_ID].branches['main'][:12]}"] * 2
    again = run(hub, "catalog", "run", catalog, "-o", tmp_path / "out", "--push-to", "me")
    assert "(0 now" in again.stdout
    other = run(hub, "catalog", "run", catalog, "-o", tmp_path / "out", "--push-to", "strangers", status=1)
    assert "2 × HubError, such as poems" in other.stdout
    assert hub.content("me/poems", "map_config.json")
