"""Quantized bases on the Hub: their pieces come as byte ranges, and a card names the model that they were made from."""

from __future__ import annotations

import json

import pytest

from tests.gguf_files import save_gguf
from tests.hub.conftest import adapter_files, error_of, files_of
from tests.hub.test_ranges import transferred
from tests.models import save_adapter, save_tokenizer
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


def test_a_gguf_file(models, run, hub, tmp_path):
    """Named by its path in the repository: its header and what is adapted come as ranges, a merge takes all of it."""
    file = tmp_path / "model-Q8_0.gguf"
    save_gguf(save_plain(tmp_path / "plain"), file)
    name = f"{QUANTIZED}/files/{file.name}"
    hub.repo(QUANTIZED, {f"files/{file.name}": file.read_bytes()})
    adapter = save_adapter(tmp_path / "plain", tmp_path / "dora", use_dora=True)
    save_tokenizer(adapter)
    for base, out in [(name, "hub"), (file, "local")]:
        run(hub, "upgrade", adapter, "-o", tmp_path / out, "--base", base, "--quiet")
        run(hub, "merge", adapter, "-o", tmp_path / f"{out}-merged", "--base", base, "-q")
    for file_name in (ADAPTER, f"../{{}}-merged/{WEIGHTS}"):
        found = [(tmp_path / out / file_name.format(out)).read_bytes() for out in ("hub", "local")]
        assert found[0] == found[1]
    assert json.loads((tmp_path / "hub" / "map_config.json").read_bytes())["base"]["name"] == name


def test_a_gguf_file_that_is_not_there(models, run, hub, tmp_path):
    hub.repo(QUANTIZED, {"model.gguf": b"GGUF"})
    done = run(hub, "inspect", models.lora, "--base", f"{QUANTIZED}/other.gguf", status=1)
    assert "other.gguf" in error_of(done)
    done = run(hub, "inspect", models.lora, "--base", QUANTIZED, status=1)
    assert "model.gguf" in error_of(done)
