"""``mapconv extract`` of models on the Hub, and of models in codes: the same bytes as of local, plain ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from tests.files import copy
from tests.hub.conftest import files_of
from tests.quantized import WEIGHTS, quantize_with_twin, save_plain

ADAPTER = "adapter_model.safetensors"


def finetune(base, out):
    """Every matrix changed a little."""
    copy(base, out)
    draw = torch.Generator().manual_seed(1)
    weights = load_file(base / WEIGHTS)
    for name, weight in weights.items():
        if weight.ndim == 2:
            noise = 0.01 * torch.randn(weight.shape, generator=draw)
            weights[name] = (weight.float() + noise).to(weight.dtype)
    save_file(weights, out / WEIGHTS, {"format": "pt"})
    return out


def test_models_on_the_hub(models, run, hub, tmp_path):
    tuned = finetune(models.base, tmp_path / "tuned")
    hub.repo("lab/model", files_of(models.base))
    hub.repo("lab/tuned", files_of(tuned))
    run(hub, "extract", "lab/tuned", "--base", "lab/model", "-o", tmp_path / "hub", "-q", "--rank", "4")
    run(hub, "extract", tuned, "--base", models.base, "-o", tmp_path / "local", "-q", "--rank", "4")
    assert (tmp_path / "hub" / ADAPTER).read_bytes() == (tmp_path / "local" / ADAPTER).read_bytes()
    record = json.loads((tmp_path / "hub" / "map_config.json").read_text())
    assert (record["base"]["name"], record["source"]["name"]) == ("lab/model", "lab/tuned")
    assert json.loads((tmp_path / "hub" / "adapter_config.json").read_text())["base_model_name_or_path"] == "lab/model"


@pytest.mark.parametrize("which", ["base", "finetune", "both"])
def test_models_in_codes(which, tmp_path):
    """Codes stand for the values that their twin stores plain."""
    plain = save_plain(tmp_path / "plain")
    tuned = finetune(plain, tmp_path / "tuned")
    bases, finetunes = (plain, plain), (tuned, tuned)
    if which != "finetune":
        bases = quantize_with_twin(plain, "nf4", tmp_path / "base")
    if which != "base":
        finetunes = quantize_with_twin(tuned, "nf4", tmp_path / "finetune")
    for name, one, two in zip(("codes", "values"), finetunes, bases, strict=True):
        mapconv.extract(one, tmp_path / name, base=two, rank=4, force=True)
    made, wanted = (load_file(tmp_path / name / ADAPTER) for name in ("codes", "values"))
    assert made.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(made[key], value), key
