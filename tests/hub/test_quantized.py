"""Quantized bases on the Hub: their pieces come as byte ranges, and a card names the model that they were made from."""

from __future__ import annotations

import json

import pytest

from tests.gguf_files import save_gguf
from tests.hub.conftest import adapter_files, error_of, files_of
from tests.hub.test_ranges import transferred
from tests.models import save_adapter
from tests.quantized import WEIGHTS, quantize, save_plain

ADAPTER = "adapter_model.safetensors"
QUANTIZED = "lab/model-4bit"


@pytest.mark.parametrize("storage", ["nf4-double", "gptq-order", "fp8-blocks"])
def test_the_pieces_come_as_ranges(storage, models, run, hub, tmp_path):
    base = quantize(models.base, storage, tmp_path)
    hub.repo(QUANTIZED, files_of(base))
    run(hub, "upgrade", models.dora, "-o", tmp_path / "ranged", "--base", QUANTIZED, "--quiet")
    run(hub, "upgrade", models.dora, "-o", tmp_path / "local", "--base", base, "--quiet")
    assert (tmp_path / "ranged" / ADAPTER).read_bytes() == (tmp_path / "local" / ADAPTER).read_bytes()
    assert 0 < transferred(hub) < 0.8 * (base / WEIGHTS).stat().st_size


def test_original_is_what_the_card_names(models, run, hub, tmp_path):
    base = quantize(models.base, "nf4", tmp_path)
    card = b"---\nbase_model: lab/model\nbase_model_relation: quantized\n---\n"
    hub.repo(QUANTIZED, files_of(base) | {"README.md": card})
    hub.repo("lab/model", files_of(models.base))
    hub.repo("lab/lora", adapter_files(models.lora, QUANTIZED))
    run(hub, "merge", "lab/lora", "--base", "original", "-o", tmp_path / "out", "-q")
    run(hub, "merge", models.lora, "--base", models.base, "-o", tmp_path / "expected", "-q")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "expected" / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "out" / "map_merge.json").read_bytes())["base"]["name"] == "lab/model"


def test_a_silent_card_is_an_error(models, run, hub, tmp_path):
    hub.repo(QUANTIZED, files_of(quantize(models.base, "nf4", tmp_path)))
    hub.repo("lab/lora", adapter_files(models.lora, QUANTIZED))
    done = run(hub, "merge", "lab/lora", "--base", "original", "-o", tmp_path / "out", status=1)
    assert QUANTIZED in error_of(done)
    assert "card" in error_of(done)


@pytest.mark.parametrize("folder", ["", "files/"])
def test_a_gguf_file(folder, models, run, hub, tmp_path):
    """Named by its path in the repository: its header and what is adapted come as ranges, a merge takes all of it."""
    file = tmp_path / "model-Q8_0.gguf"
    save_gguf(save_plain(tmp_path / "plain"), file)
    hub.repo(QUANTIZED, {f"{folder}{file.name}": file.read_bytes()})
    adapter, name = (
        save_adapter(tmp_path / "plain", tmp_path / "dora", use_dora=True),
        f"{QUANTIZED}/{folder}{file.name}",
    )
    run(hub, "upgrade", adapter, "-o", tmp_path / "ranged", "--base", name, "--quiet")
    run(hub, "upgrade", adapter, "-o", tmp_path / "local", "--base", file, "--quiet")
    assert (tmp_path / "ranged" / ADAPTER).read_bytes() == (tmp_path / "local" / ADAPTER).read_bytes()
    record = json.loads((tmp_path / "ranged" / "map_config.json").read_bytes())
    assert record["base"]["name"] == name
    run(hub, "merge", adapter, "-o", tmp_path / "merged", "--base", name, "-q")
    run(hub, "merge", adapter, "-o", tmp_path / "expected", "--base", file, "-q")
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == (tmp_path / "expected" / WEIGHTS).read_bytes()


def test_a_gguf_file_that_is_not_there(models, run, hub, tmp_path):
    hub.repo(QUANTIZED, {"model.gguf": b"GGUF"})
    done = run(hub, "inspect", models.lora, "--base", f"{QUANTIZED}/other.gguf", status=1)
    assert "other.gguf" in error_of(done)
    done = run(hub, "inspect", models.lora, "--base", QUANTIZED, status=1)
    assert "model.gguf" in error_of(done)
