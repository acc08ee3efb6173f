"""How many of PEFT's layers stand in memory at a time: what a method derives of a layer is as large as its weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import FourierFTConfig, get_peft_model

import mapconv
from mapconv.tuners import layers, sites
from mapconv.tuners.injection import inject
from tests.models import load_base

#: In each of the two layers of the base.
PATHS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]


@pytest.fixture(scope="module")
def fourier(models: Path, base: Path) -> Path:
    torch.manual_seed(0)
    targets = [path.rpartition(".")[2] for path in PATHS]
    model = get_peft_model(load_base(base), FourierFTConfig(n_frequency=10, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fourierft" in name:
                parameter.normal_()
    model.save_pretrained(models / "fourier")
    return models / "fourier"


@pytest.fixture
def injected(monkeypatch) -> list[tuple[bool, int]]:
    """Of each model that is built: whether to check names and shapes, and how many layers it has."""
    calls = []

    def spy(bases, config, *, without_values=False):
        calls.append((without_values, len(bases)))
        return inject(bases, config, without_values=without_values)

    monkeypatch.setattr(layers, "inject", spy)
    return calls


def test_layers_are_built_with_room_for_their_weights(fourier, base, injected, tmp_path, monkeypatch):
    trims = []
    monkeypatch.setattr(layers, "trim", lambda: trims.append(None))
    for module in (layers, sites):
        monkeypatch.setattr(module, "GROUP_BYTES", 1)
    mapconv.merge(fourier, tmp_path / "out", base=base)
    model = load_base(base)
    shapes = {model.get_submodule(f"model.layers.0.{path}").weight.shape for path in PATHS}
    assert len(shapes) < len(PATHS)
    # Of layers with the same shapes one is checked, and then each is built when its turn comes.
    assert injected == [(True, len(shapes)), *[(False, 1)] * 2 * len(PATHS)]
    assert len(trims) == 2 * len(PATHS)
