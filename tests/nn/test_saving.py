"""What ``save_adapter`` writes: the same bytes for what was only loaded, and what stock PEFT and mapconv make of it."""

from __future__ import annotations

import filecmp
import json
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import mapconv
from mapconv.errors import OutputError, UnsupportedError
from mapconv.formats import read_adapter
from mapconv.nn import (
    MapConfig,
    get_map_model,
    load_adapter,
    map_layers,
    merge_adapter,
    save_adapter,
    scalar_parameters,
)
from tests.models import load_adapted, load_base, log_probabilities
from tests.nn.test_running import close

WRITTEN = ("adapter_model.safetensors", "adapter_config.json", "map_config.json")


def trained(base, direction: str, *, seed: int = 0):
    """A model whose fresh adapter has been moved far from its start, scalars included."""
    model = get_map_model(load_base(base), MapConfig(rank=4, direction=direction, seed=seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                size = 0.1 if parameter.numel() == 1 or name.endswith("magnitude") else 0.02
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["low-rank", "dora"])
def test_load_and_save_gives_the_same_bytes(base, dora, tmp_path, direction, dtype):
    mapconv.upgrade(dora, tmp_path / "map", base=base, direction=direction, dtype=dtype)
    model = load_adapter(load_base(base), tmp_path / "map", trainable="all")
    save_adapter(model, tmp_path / "again")
    for name in (*WRITTEN, "README.md"):
        assert filecmp.cmp(tmp_path / "map" / name, tmp_path / "again" / name, shallow=False), name


@pytest.mark.parametrize("direction", ["low-rank", "dora"])
def test_a_trained_adapter_is_the_same_everywhere(base, tmp_path, direction):
    """In the live model, in stock PEFT, merged by mapconv, and loaded again."""
    model = trained(base, direction)
    live = log_probabilities(model)
    save_adapter(model, tmp_path / "map")
    assert close(log_probabilities(load_adapted(base, tmp_path / "map")), live)
    assert close(log_probabilities(load_adapter(load_base(base), tmp_path / "map")), live)
    mapconv.merge(tmp_path / "map", tmp_path / "merged")
    assert close(log_probabilities(load_base(tmp_path / "merged")), live)
    assert close(log_probabilities(load_adapted(base, tmp_path / "map")), live)
    adapter = read_adapter(tmp_path / "map")
    assert adapter.map_config["base"]["name"] == str(base)
    assert adapter.map_config["source"] is None
    for scalars in adapter.map_modules:
        assert scalars.error is None
        assert scalars.base_gain == pytest.approx(scalars.update_gain, rel=1e-12)
        if direction == "low-rank":
            layer = map_layers(model)[scalars.path]
            assert scalars.alpha == layer.alpha("default")
            update = layer.update("default")
            # Below the floor the update has not grown to the size of β yet.
            grown = min(1.0, float((update.B.double() @ update.A.double()).norm().detach()) / update.floor)
            assert scalars.beta == pytest.approx(grown * abs(layer.beta("default")), rel=1e-6)
    save_adapter(load_adapter(load_base(base), tmp_path / "map"), tmp_path / "again")
    assert filecmp.cmp(tmp_path / "map" / WRITTEN[0], tmp_path / "again" / WRITTEN[0], shallow=False)
    assert read_adapter(tmp_path / "again").map_modules == adapter.map_modules


def test_scalars_alone_trained(base, map_dir, tmp_path):
    """A keeps its bytes, B takes the quotient of the gains, and untouched weights keep everything."""
    model = load_adapter(load_base(base), map_dir, trainable="scalars")
    layer = map_layers(model)["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        layer.updates["default"].relative_beta.mul_(1.5)
    live = log_probabilities(model)
    save_adapter(model, tmp_path / "map")
    before, after = load_file(map_dir / WRITTEN[0]), load_file(tmp_path / "map" / WRITTEN[0])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    assert changed == {f"{prefix}.lora_B.weight", f"{prefix}.lora_magnitude_vector"}
    assert close(log_probabilities(load_adapted(base, tmp_path / "map")), live)
    old, new = (read_adapter(folder) for folder in (map_dir, tmp_path / "map"))
    errors = {module.path: module.error for module in new.map_modules}
    assert errors.pop(layer.path) is None
    assert errors == {m.path: m.error for m in old.map_modules if m.path != layer.path}
    assert new.map_config["source"]["method"] == "MAP"
    assert new.map_config["source"]["source"] == old.map_config["source"]


def test_a_lora_that_stays_a_lora_is_saved_as_one(base, lora, tmp_path):
    save_adapter(load_adapter(load_base(base), lora), tmp_path / "map")
    assert json.loads((tmp_path / "map" / "adapter_config.json").read_text())["use_dora"] is False
    report = mapconv.verify(tmp_path / "map", lora, base=base, samples=1)
    assert report.worst_module.error < 1e-6


def test_a_model_from_memory_names_no_base(base, tmp_path):
    model = trained(base, "low-rank")
    model.name_or_path = model.config._name_or_path = ""
    save_adapter(model, tmp_path / "map")
    record = read_adapter(tmp_path / "map")
    assert record.map_config["base"]["name"] is None
    assert record.base is None
    mapconv.merge(tmp_path / "map", tmp_path / "merged", base=base)


def test_commands_read_an_adapter_without_error(base, tmp_path, run):
    save_adapter(trained(base, "low-rank"), tmp_path / "map")
    for words in (("inspect", tmp_path / "map"), ("merge", tmp_path / "map", "-o", tmp_path / "out")):
        assert run(*words).status == 0
    card = (tmp_path / "map" / "README.md").read_text()
    assert "trained with mapconv" in card
    assert "no source to compare it with" in card
    assert "converted" not in card.partition("## What MAP is")[0]


def test_what_cannot_be_written_is_refused(base, lora, tmp_path):
    model = trained(base, "low-rank")
    with torch.no_grad():
        scalar_parameters(model, "default")[0].fill_(1e-5)
    with pytest.raises(OutputError, match="base gain is 1e-05"):
        save_adapter(model, tmp_path / "map")
    with torch.no_grad():
        scalar_parameters(model, "default")[0].fill_(1.0)
        next(iter(map_layers(model).values())).updates["default"].B.fill_(float("nan"))
    with pytest.raises(OutputError, match="NaN"):
        save_adapter(model, tmp_path / "map")
    assert list(tmp_path.iterdir()) == []
    model = load_adapter(load_base(base), lora)
    model.lm_head.requires_grad_(True)
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight is trainable"):
        save_adapter(model, tmp_path / "map")
    model.lm_head.requires_grad_(False)
    merge_adapter(model)
    with pytest.raises(UnsupportedError, match="unmerge_adapter"):
        save_adapter(model, tmp_path / "map")
    with pytest.raises(OutputError, match="exists already"):
        save_adapter(load_adapter(load_base(base), lora), lora)


def test_saving_over_what_was_loaded(base, own_lora):
    model = load_adapter(load_base(base), own_lora)
    live = log_probabilities(model)
    save_adapter(model, own_lora, force=True)
    assert close(log_probabilities(load_adapted(base, own_lora)), live)


def test_killed_at_any_moment(base, map_dir, tmp_path):
    """OUT is absent or complete, and the next save puts all right."""
    import multiprocessing

    model = load_adapter(load_base(base), map_dir)
    context = multiprocessing.get_context("fork")  # the model is in memory already: the moments fall into the work
    whole = context.Process(target=save_slowly, args=(model, tmp_path / "expected"))
    started = time.perf_counter()
    whole.start()
    whole.join()
    duration = time.perf_counter() - started
    out, landed, moments = tmp_path / "out", 0, random.Random(0)
    for kill in range(16):
        victim = context.Process(target=save_slowly, args=(model, out))
        victim.start()
        victim.join(duration * 1.2 * (kill + moments.random()) / 16)
        victim.kill()
        victim.join()
        assert victim.exitcode in (0, -signal.SIGKILL)
        landed += any(tmp_path.glob(".out.partial-*"))
        if out.exists():
            assert_same(out, tmp_path / "expected")
    assert landed, "no kill fell into the work: the test proves nothing on this machine"
    save_adapter(model, out, force=True)
    assert_same(out, tmp_path / "expected")
    assert {path.name for path in tmp_path.iterdir()} == {"expected", "out"}


def save_slowly(model, out) -> None:
    """On a disk that takes its time, or the whole save would be over before a kill could fall into it."""
    flush = os.fsync
    os.fsync = lambda file: (time.sleep(0.02), flush(file))
    save_adapter(model, out, force=True)


def assert_same(out, expected) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        assert filecmp.cmp(out / name, expected / name, shallow=False), name
