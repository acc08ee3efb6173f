"""Quantized bases on the Hub: their pieces come as byte ranges, and a card names the model that they were made from."""

from __future__ import annotations

import json

import pytest

from tests.hub.conftest import adapter_files, error_of, files_of
from tests.hub.test_ranges import transferred
from tests.quantized import WEIGHTS, quantize

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
