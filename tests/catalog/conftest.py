"""Small adapters made without PEFT, runs in forks, and a cache folder of the test's own."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv

LAYERS, WIDTH, RANK = 2, 8, 2
TARGETS = ("q_proj", "v_proj")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """The norms of this test's bases, and of no other's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MAPCONV_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def server():
    """Starts processes that have torch and mapconv in memory when they begin."""
    return multiprocessing.get_context("fork")


def make_base(folder: Path, *, seed: int = 0) -> Path:
    """The attention weights of a two-layer model of width 8."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{layer}.self_attn.{target}.weight" for layer in range(LAYERS) for target in TARGETS]
    folder.mkdir(parents=True)
    save_file({name: torch.randn(WIDTH, WIDTH, generator=generator) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def make_adapter(folder: Path, base: Path | str, *, seed: int = 1, use_dora: bool = False) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for target in TARGETS:
            key = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=generator) / 8
            if use_dora:
                tensors[f"{key}.lora_magnitude_vector"] = 2 + torch.rand(WIDTH, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "use_dora": use_dora}
    config |= {"target_modules": list(TARGETS), "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make_folder(root: Path, count: int, *, doras: int = 0) -> Path:
    """``root/adapters`` with ``count`` adapters on two bases in turn; the last ``doras`` of them are DoRAs."""
    bases = [make_base(root / f"base-{number}", seed=number) for number in range(2)]
    for number in range(count):
        folder = root / "adapters" / f"a{number:03d}"
        make_adapter(folder, bases[number % 2], seed=number, use_dora=number >= count - doras)
    return root / "adapters"


@pytest.fixture
def adapters(tmp_path) -> Path:
    """Six adapters on two bases, one of them a DoRA."""
    return make_folder(tmp_path, 6, doras=1)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of every output; the ledger and the run's own folder tell of times, and are left out."""
    files = (path for path in out.rglob("*") if path.is_file())
    names = {str(path.relative_to(out)): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if name.partition("/")[0] not in _OWN}


_OWN = ("ledger.jsonl", ".mapconv")


def ledger(out: Path) -> dict[str, dict]:
    """The last line of each entry."""
    first, *lines = map(json.loads, (out / "ledger.jsonl").read_text().splitlines())
    assert first == {"ledger": 1, "mapconv_version": mapconv.__version__}
    return {line["entry"]: line for line in lines}


def lines(out: Path) -> int:
    return len((out / "ledger.jsonl").read_text().splitlines()) - 1


def poison(adapter: Path, kind: str) -> None:
    """Break an adapter in one of the ways that thousands of them are broken in."""
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    table = json.loads(config.read_text())
    tensors = load_file(weights)
    name = next(iter(tensors))
    if kind == "nan":
        tensors[name][0, 0] = float("nan")
        save_file(tensors, weights)
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif kind == "no config":
        config.unlink()
    elif kind == "no weights":
        weights.unlink()
    elif kind == "shape":
        save_file({key: value.repeat(1, 2) if "lora_A" in key else value for key, value in tensors.items()}, weights)
    elif kind == "no base":
        config.write_text(json.dumps(table | {"base_model_name_or_path": "/nowhere/model"}))
    elif kind == "method":
        config.write_text(json.dumps(table | {"peft_type": "POLY"}))
    elif kind == "pickle":
        torch.save(tensors, adapter / "adapter_model.bin")
        weights.unlink()
    elif kind == "json":
        config.write_text("{")
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "missing module":
        save_file({key: value for key, value in tensors.items() if "layers.1" not in key}, weights)
    elif kind == "is a MAP":
        made = mapconv.upgrade(adapter, adapter.parent / "made").out
        shutil.rmtree(adapter)
        made.rename(adapter)
    else:
        raise ValueError(kind)


#: Each poison, the class of its error, and words of its sentence.
POISONS = {
    "nan": ("AdapterError", "NaN"),
    "truncated": ("CheckpointError", "truncated"),
    "no config": ("UnsupportedError", "no adapter_config.json"),
    "no weights": ("AdapterError", "no adapter_model.safetensors"),
    "shape": ("PlacementError", "do not fit this base"),
    "no base": ("CheckpointError", "/nowhere/model"),
    "method": ("UnsupportedError", "POLY"),
    "pickle": ("UnsupportedError", "pickle"),
    "json": ("AdapterError", "not JSON"),
    "empty": ("CheckpointError", "empty"),
    "missing module": ("PlacementError", "incomplete"),
    "is a MAP": ("UnsupportedError", "MAP adapter already"),
}
