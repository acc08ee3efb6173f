"""A base whose weights have the right norms and other values is refused wherever the norms are compared."""

from __future__ import annotations

import json

import pytest
import torch

import mapconv
from mapconv.errors import BaseMismatchError
from mapconv.nn import get_map_model, load_adapter, save_adapter
from mapconv.nn.config import MapConfig
from tests.cli.refusals import assert_refused, nothing_written
from tests.files import copy, edit_json, edit_tensors
from tests.models import load_base

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module", params=["lora", "refitted dora", "dora as it is"])
def map_folder(request, base, lora, dora, tmp_path_factory):
    """(the MAP directory, what it was made from)"""
    folder = tmp_path_factory.mktemp("maps") / "map"
    source = lora if request.param == "lora" else dora
    direction = "dora" if request.param == "dora as it is" else "low-rank"
    mapconv.upgrade(source, folder, base=base, direction=direction)
    return folder, source


CHANGES = {
    "negated": lambda tensors: [tensor.neg_() for tensor in tensors.values()],
    "one negated": lambda tensors: tensors[UP].neg_(),
    "rows in another order": lambda tensors: tensors[UP].copy_(tensors[UP].roll(1, 0)),
    "columns in another order": lambda tensors: tensors[UP].copy_(tensors[UP].flip(1)),
}


@pytest.fixture
def changed_base(base, tmp_path):
    """The base with one weight negated."""
    folder = copy(base, tmp_path / "changed")
    edit_tensors(folder / "model.safetensors", CHANGES["one negated"])
    return folder


@pytest.mark.parametrize("how", CHANGES)
def test_merge_and_its_dry_run_refuse_it_alike(how, run, map_folder, own_base, tmp_path):
    changed_base = own_base
    edit_tensors(changed_base / "model.safetensors", CHANGES[how])
    words = ["merge", map_folder[0], "--base", changed_base, "-o", tmp_path / "out"]
    with nothing_written(tmp_path):
        said, foretold = run(*words), run(*words, "--dry-run")
        assert_refused(said, changed_base / "model.safetensors", "not its values", "--force")
    assert (foretold.status, foretold.err) == (said.status, said.err)
    assert run(*words, "--dry-run", "--force").status == 0
    assert run(*words, "--force").status == 0


def test_verify_refuses_it(run, map_folder, changed_base):
    result = run("verify", map_folder[0], "--against", map_folder[1], "--base", changed_base)
    assert_refused(result, changed_base / "model.safetensors", "not its values")


def test_loading_refuses_it(map_folder, changed_base):
    for dtype in (torch.float32, torch.bfloat16):
        model = load_base(changed_base, dtype)
        with pytest.raises(BaseMismatchError, match="not its values"):
            load_adapter(model, map_folder[0])
    load_adapter(model, map_folder[0], check_base=False)


def test_calibrate_refuses_it(run, map_folder, changed_base, tmp_path):
    (tmp_path / "data.txt").write_text("a bird in the hand\n" * 400)
    words = ["calibrate", map_folder[0], "--against", map_folder[1], "--data", tmp_path / "data.txt"]
    words += ["--base", changed_base, "-o", tmp_path / "out", "--steps", "1", "--sequence-length", "16"]
    with nothing_written(tmp_path):
        assert_refused(run(*words), "not its values")


def test_the_same_base_in_any_storage_is_the_same(map_folder, base, sharded, half_base, tmp_path):
    """Shards and a model in memory, in the file's dtype or rounded to another, give the projections of the one file."""
    mapconv.merge(map_folder[0], tmp_path / "merged", base=sharded)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        load_adapter(load_base(base, dtype), map_folder[0])
    with pytest.raises(BaseMismatchError, match="has norm"):
        mapconv.merge(map_folder[0], tmp_path / "half", base=half_base)


def test_a_directory_of_an_older_version_is_read_and_its_norms_are_compared(map_folder, base, other_base, tmp_path):
    old = copy(map_folder[0], tmp_path / "old")
    entries = json.loads((old / "map_config.json").read_text())["modules"]
    assert all(entry.pop("base_projection") for entry in entries)
    edit_json(old / "map_config.json", modules=entries)
    mapconv.merge(old, tmp_path / "merged", base=base)
    save_adapter(load_adapter(load_base(base), old), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "map_config.json").read_text())["modules"] == entries
    with pytest.raises(BaseMismatchError, match="has norm"):
        mapconv.merge(old, tmp_path / "out", base=other_base)
    forced = mapconv.merge(old, tmp_path / "out", base=other_base, force=True)
    weights = f"accepted with --force: {len(entries)} weights of another base; model.layers."
    assert [note for note in forced.notes if note.startswith(weights) and "has norm" in note]


def test_an_adapter_that_was_trained_records_it_too(base, lora, tmp_path):
    model = load_base(base)
    get_map_model(model, MapConfig(rank=2, targets=["up_proj"]))
    save_adapter(model, tmp_path / "fresh")
    loaded = load_adapter(load_base(base), lora, trainable="all")
    save_adapter(loaded, tmp_path / "loaded")
    mapconv.upgrade(lora, tmp_path / "upgraded", base=base)
    found = {
        name: {
            entry["path"]: entry["base_projection"]
            for entry in json.loads((tmp_path / name / "map_config.json").read_text())["modules"]
        }
        for name in ("fresh", "loaded", "upgraded")
    }
    assert found["loaded"] == pytest.approx(found["upgraded"], rel=1e-12)
    assert found["fresh"] == pytest.approx({p: found["upgraded"][p] for p in found["fresh"]}, rel=1e-12)


def test_a_dry_run_says_what_else_the_merge_will_say(run, own_lora, own_base, tmp_path):
    """Values that no header shows: NaN in the base, an update that no 16 bits hold, factors of another adapter."""
    words = ["merge", own_lora, "--base", own_base, "-o", tmp_path / "out"]
    whole, half = run(*words, "--dry-run"), run(*words, "--dry-run", "--dtype", "float16")
    assert (whole.status, half.status) == (0, 0)
    (own_base / "config.json").unlink()
    edit_tensors(own_base / "model.safetensors", lambda tensors: tensors[UP].mul_(1e6))
    with nothing_written(tmp_path):
        assert "has no config.json" in run(*words, "--dry-run").err
        assert_refused(run(*words, "--dtype", "float16", "--dry-run"), "overflow", UP)
    edit_tensors(own_base / "model.safetensors", lambda tensors: tensors[UP].fill_(float("nan")))
    with nothing_written(tmp_path):
        assert_refused(run(*words, "--dry-run"), "NaN", UP)
