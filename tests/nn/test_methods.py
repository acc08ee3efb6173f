"""MAP on other methods of PEFT's: the formula and its gradients, what is saved, and what the commands make of it."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.nn import MapConfig, detach, get_map_model, load_adapter, map_layers, save_adapter
from mapconv.nn.method_files import SCALAR_NAMES
from mapconv.nn.methods import MethodUpdate
from tests.files import copy
from tests.models import load_adapted, load_base, log_probabilities, prompts
from tests.nn.test_running import close
from tests.training.conftest import SETTINGS

CONFIGS = {
    "LoHa": lambda: peft.LoHaConfig(r=4),
    "LoKr": lambda: peft.LoKrConfig(r=4),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=4, total_step=10),
    "VeRA": lambda: peft.VeraConfig(r=4),
}


def trained(base, method: str, *frozen: str):
    """A model with MAP on a method in two layers, moved away from its start."""
    targets = ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")
    model = get_map_model(load_base(base), MapConfig(direction=CONFIGS[method](), targets=targets, frozen=frozen))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                size = 0.1 if "relative" in name else 0.3
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def updates(model) -> list[tuple[torch.nn.Module, MethodUpdate]]:
    return [(layer.base_layer, layer.update("default")) for layer in map_layers(model).values()]


@pytest.mark.parametrize("method", CONFIGS)
def test_gradients_are_those_of_the_formula(base, method):
    """Of α·W0/‖W0‖ + β·Δ/‖Δ‖ in float64, with Δ as the stock layer forms it."""
    model = trained(base, method).double()
    for layer, update in updates(model):
        weight = layer.weight.detach()
        x = torch.randn(3, weight.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = torch.autograd.grad(update.run(layer, x).square().sum(), [*update.factors, *update.scalars])
        delta, norm = update.layer.get_delta_weight("default"), weight.norm()
        alpha, beta = update.relative_alpha * norm, update.relative_beta * norm
        merged = alpha * weight / norm + beta * delta / delta.norm()
        wanted = torch.autograd.grad((x @ merged.T).square().sum(), [*update.factors, *update.scalars])
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).norm() <= 1e-9 * theirs.norm()


def test_training_starts_at_the_base_or_where_the_method_does(base):
    model = load_base(base)
    plain = log_probabilities(model)
    get_map_model(model, MapConfig(direction=CONFIGS["LoHa"](), targets=("q_proj",)))
    assert torch.equal(log_probabilities(model), plain)
    # The first step is that of the plain method, times β over the floor.
    model(prompts()[:1], labels=prompts()[:1]).loss.backward()
    assert any(p.grad is not None and p.grad.any() for _, update in updates(model) for p in update.factors)
    detach(model)
    assert torch.equal(log_probabilities(model), plain)
    config = peft.FourierFTConfig(n_frequency=20, target_modules=["q_proj"])
    get_map_model(model, MapConfig(direction=config))
    assert len(map_layers(model)) == 2  # PEFT's own targets
    for _, update in updates(model):
        assert update.length() > 0
        assert update.is_unscaled


@pytest.mark.parametrize(
    ("method", "frozen"),
    [("LoHa", ()), ("LoHa", ("alpha",)), ("AdaLoRA", ("alpha",)), ("VeRA", ()), ("VeRA", ("alpha",))],
)
def test_what_is_saved_is_the_same_everywhere(base, method, frozen, tmp_path):
    """With α as it was the file is the method's own; stock PEFT refuses the other, whose scalars it does not know."""
    model = trained(base, method, *frozen)
    live, folder = log_probabilities(model), tmp_path / "saved"
    save_adapter(model, folder)
    assert torch.equal(log_probabilities(model), live)  # nothing is left scaled
    assert close(log_probabilities(load_adapter(load_base(base), folder)), live)
    mapconv.merge(folder, tmp_path / "merged", base=base)
    assert close(log_probabilities(load_base(tmp_path / "merged")), live)
    kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    if frozen:
        assert kind == method.upper()
        assert close(log_probabilities(load_adapted(base, folder)), live)
    else:
        assert kind == f"MAP_{method.upper()}"
        with pytest.raises(KeyError):
            load_adapted(base, folder)
        report = mapconv.verify(tmp_path / "merged", folder, base=base, samples=1)
        assert report.kl < 1e-9 < report.kl_base
        assert report.worst_module.error < 1e-5
    card = (folder / "README.md").read_text()
    assert ("Stock PEFT loads it" in card, "no release of PEFT" in card) == (bool(frozen), not frozen)
    assert f"- {method.lower()}" in card
    again = load_adapter(load_base(base), folder, trainable="all")
    save_adapter(again, tmp_path / "again")
    assert close(log_probabilities(load_adapter(load_base(base), tmp_path / "again")), live)


def test_upgrade_gives_a_map_directory(base, tmp_path):
    """Δ of VeRA has its rank, and a the gain of α, so that the MAP directory is exact."""
    model = trained(base, "VeRA")
    save_adapter(model, tmp_path / "vera")
    report = mapconv.upgrade(tmp_path / "vera", tmp_path / "map", base=base)
    assert max(module.measured_error for module in report.modules) < 1e-5
    for module in report.modules:
        assert module.alpha == pytest.approx(map_layers(model)[module.path].alpha("default"), rel=1e-5)
        assert module.beta == pytest.approx(abs(map_layers(model)[module.path].beta("default")), rel=1e-4)
    assert close(log_probabilities(load_adapted(base, tmp_path / "map")), log_probabilities(model))
    verified = mapconv.verify(tmp_path / "map", tmp_path / "vera", base=base, samples=1, save=True)
    assert verified.kl < 1e-9 < verified.kl_base
    assert {error.path for error in verified.modules} == set(map_layers(model))
    assert verified.worst_module.error < 1e-5


def test_inspect_says_who_wrote_it(base, dora, run, tmp_path):
    save_adapter(trained(base, "LoHa"), tmp_path / "loha")
    mapconv.upgrade(dora, tmp_path / "map", base=base)
    for folder, writer in ((tmp_path / "loha", "mapconv"), (tmp_path / "map", "mapconv"), (dora, "PEFT")):
        assert f"  written   by {writer}" in run("inspect", folder).out


def test_calibrate_against_another_method(base, text, run, tmp_path):
    save_adapter(trained(base, "LoHa"), tmp_path / "loha")
    assert run("upgrade", tmp_path / "loha", "--base", base, "--rank", 4, "--out", tmp_path / "map").status == 0
    words = ["--sequence-length", 32, "--held-out", 6, "--lr", SETTINGS["learning_rate"], "--steps", 5]
    words += ["--data", text, "--out", tmp_path / "out"]
    done = run("calibrate", tmp_path / "map", "--against", tmp_path / "loha", *words)
    assert done.status == 0, done.err
    numbers = json.loads((tmp_path / "out" / "map_config.json").read_text())["calibration"]["models"]
    assert numbers["calibrated"]["kl"] < numbers["closed form"]["kl"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: peft.OFTConfig(r=0, oft_block_size=8), "do not add"),
        (lambda: peft.IA3Config(feedforward_modules=[]), "more than a weight"),
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=2), "changes no weight"),
    ],
)
def test_methods_without_an_update_are_refused(base, config, reason):
    model = load_base(base)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(UnsupportedError, match=reason):
        get_map_model(model, MapConfig(direction=config(), targets=("q_proj",)))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    with pytest.raises(ValueError, match="rank and init"):
        MapConfig(direction=config(), rank=4)


@pytest.mark.parametrize("damage", ["missing", "shape", "infinite", "idle"])
def test_scalars_that_are_wrong_are_named(base, damage, tmp_path):
    save_adapter(trained(base, "LoHa"), tmp_path / "whole")
    folder = copy(tmp_path / "whole", tmp_path / "broken")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith(SCALAR_NAMES[0]))
    if damage == "missing":
        del tensors[key]
    elif damage == "idle":
        tensors["base_model.model.model.layers.9.map_beta"] = torch.tensor(1.0)
    else:
        tensors[key] = torch.ones(2) if damage == "shape" else torch.tensor(torch.inf)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"map_alpha|map_beta"):
        mapconv.inspect(folder)
