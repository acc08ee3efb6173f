"""Stacked experts and repeated layers in a live model: gradients, what is saved of them, and a calibration of both."""

from __future__ import annotations

import filecmp
import functools
import json

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import mapconv
from mapconv.errors import BaseMismatchError, UnsupportedError
from mapconv.nn import (
    MapConfig,
    detach,
    factor_parameters,
    get_map_model,
    load_adapter,
    map_layers,
    save_adapter,
    scalar_parameters,
    set_adapter,
)
from mapconv.nn.stacks import StackUpdate
from tests.models import load_adapted, load_base, log_probabilities, save_tokenizer
from tests.models import save_adapter as save_with_peft
from tests.nn.test_running import close
from tests.nn.test_saving import WRITTEN
from tests.training.conftest import SETTINGS, read_record

TWICE = {"layer_replication": [[0, 2], [1, 2]]}


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def moe(models):
    """A tiny mixture of experts with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "head_dim": 8, "vocab_size": 64}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4}
    config = Qwen3MoeConfig(**sizes, **counts, num_experts_per_tok=2, initializer_range=0.18)
    Qwen3MoeForCausalLM(config).save_pretrained(models / "moe")
    save_tokenizer(models / "moe")
    return models / "moe"


@pytest.fixture(scope="module")
def stacked(models, moe):
    """A LoRA on both stacks and on attention, and its MAP form."""
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    save_with_peft(moe, models / "moe-lora", **targets)
    mapconv.upgrade(models / "moe-lora", models / "moe-map", base=moe)
    return models / "moe-lora", models / "moe-map"


@pytest.fixture(scope="module")
def repeated(models, base):
    """A DoRA on repeated layers, and its MAP form."""
    save_with_peft(base, models / "repeated", use_dora=True, **TWICE)
    mapconv.upgrade(models / "repeated", models / "repeated-map", base=base)
    return models / "repeated", models / "repeated-map"


def test_a_router_of_another_rank_has_it_in_stock_peft(moe, tmp_path):
    """PEFT looks the rank of what ``target_parameters`` names up by the parameter, not by its module."""
    targets = {"target_modules": ["q_proj", "k_proj"], "target_parameters": ["gate.weight"]}
    save_with_peft(moe, tmp_path / "lora", **targets, rank_pattern={"gate.weight": 2})
    wanted = log_probabilities(load_adapted(moe, tmp_path / "lora"))
    mapconv.upgrade(tmp_path / "lora", tmp_path / "map", base=moe)
    model = load_adapter(load_base(moe), tmp_path / "map", trainable="scalars")
    with torch.no_grad():
        for scalar in scalar_parameters(model, "default"):
            scalar.mul_(1 + (1e-6 if scalar.requires_grad else 0))
    save_adapter(model, tmp_path / "saved")
    for folder in ("map", "saved"):
        assert read_json(tmp_path / folder / "adapter_config.json")["rank_pattern"].keys() == {
            f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)
        }
        assert close(log_probabilities(load_adapted(moe, tmp_path / folder)), wanted, atol=1e-4)


def test_the_source_and_its_conversion_share_the_stacks(moe, stacked):
    lora, converted = stacked
    model = load_base(moe)
    plain, wanted = log_probabilities(model), log_probabilities(load_adapted(moe, lora))
    load_adapter(model, lora, name="source")
    load_adapter(model, converted, name="map", trainable="scalars")
    for name, expected in (("source", wanted), (None, plain), ("map", wanted)):
        set_adapter(model, name)
        assert close(log_probabilities(model), expected)
    # One β for every expert, and no α: stock PEFT could not compute it.
    assert sorted(p.shape for p in scalar_parameters(model, "map") if p.requires_grad) == [(1,)] * 2 + [(4,)] * 4
    detach(model)
    assert torch.equal(log_probabilities(model), plain)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_the_formula(transposed):
    """Of W0 + β·Δ/‖Δ‖ for each expert, by autograd in float64; the update forms its own backward pass."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights, upstream = draw(3, 7, 5), draw(3, 7, 5)
    norms = weights.flatten(1).norm(dim=1)
    leaves = {"A": draw(3, 2, 5), "B": draw(3, 7, 2), "relative_beta": torch.tensor([0.5, -0.2, 0.0]).double()}
    facts = {"base_norms": norms.tolist(), "base_projections": [None] * 3}
    update = StackUpdate(leaves["A"], leaves["B"], relative_betas=leaves["relative_beta"].tolist(), **facts)
    update.requires_grad_(True)
    stored = weights.mT.contiguous().mT if transposed else weights
    merged = update.merged(stored, torch.float64)
    for leaf in leaves.values():
        leaf.requires_grad_()
    product = leaves["B"] @ leaves["A"]
    wanted = weights + (leaves["relative_beta"] * norms / product.flatten(1).norm(dim=1))[:, None, None] * product
    torch.testing.assert_close(merged, wanted)
    (merged * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(getattr(update, name).grad, leaf.grad)


def test_what_was_only_loaded_is_saved_to_the_same_bytes(moe, stacked, base, repeated, tmp_path):
    for folder, (_, converted) in ((moe, stacked), (base, repeated)):
        out = tmp_path / converted.name
        save_adapter(load_adapter(load_base(folder), converted, trainable="all"), out)
        for name in WRITTEN:
            assert filecmp.cmp(converted / name, out / name, shallow=False), name


@pytest.mark.parametrize("kind", ["stacked", "repeated"])
def test_a_trained_adapter_is_the_same_everywhere(kind, request, tmp_path):
    """In the live model, in stock PEFT, loaded again, and merged."""
    folder, (_, converted) = (
        request.getfixturevalue("moe" if kind == "stacked" else "base"),
        request.getfixturevalue(kind),
    )
    model = load_adapter(load_base(folder), converted, trainable="all")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*scalar_parameters(model, "default"), *factor_parameters(model, "default")):
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    live = log_probabilities(model)
    assert not close(live, log_probabilities(load_adapter(load_base(folder), converted)), atol=1e-2)
    save_adapter(model, tmp_path / "saved")
    assert close(log_probabilities(load_adapted(folder, tmp_path / "saved")), live)
    assert close(log_probabilities(load_adapter(load_base(folder), tmp_path / "saved")), live)
    mapconv.merge(tmp_path / "saved", tmp_path / "merged", base=folder)
    assert close(log_probabilities(load_base(tmp_path / "merged")), live)
    for path, layer in map_layers(model).items():
        recorded = {(m.path, m.expert): m.beta for m in mapconv.formats.read_adapter(tmp_path / "saved").map_modules}
        update = layer.update("default")
        if isinstance(update, StackUpdate):
            assert [recorded[path, expert] for expert in range(4)] == pytest.approx(update.betas(), rel=1e-6)


def test_adapters_with_other_layers_do_not_share_a_model(base, repeated, lora):
    model = load_base(base)
    names, layers = dict(model.named_modules()), model.config.num_hidden_layers
    load_adapter(model, repeated[0])
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    with pytest.raises(UnsupportedError, match="layer_replication"):
        load_adapter(model, lora, name="other")
    with pytest.raises(UnsupportedError, match="layer_replication"):
        get_map_model(model, MapConfig(), name="other")
    detach(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(BaseMismatchError):
        load_adapter(model, repeated[1])
    assert dict(model.named_modules()) == names
    assert model.config.num_hidden_layers == layers


@pytest.mark.parametrize("kind", ["stacked", "repeated"])
def test_calibrate(kind, request, text, run, tmp_path):
    """As a user types it: a LoRA's form, which is exact, learns a task; a DoRA's comes nearer to its source."""
    source, converted = request.getfixturevalue(kind)
    words = ["--sequence-length", 32, "--held-out", 6, "--lr", SETTINGS["learning_rate"], "--steps", 5]
    words += ["--objective", "task", "--train", "all"] if kind == "stacked" else []
    done = run("calibrate", converted, "--against", source, "--data", text, "--out", tmp_path / "out", *words)
    assert done.status == 0, done.err
    record = read_record(tmp_path / "out")["calibration"]
    measure = "kl" if kind == "repeated" else "loss"
    assert record["models"]["calibrated"][measure] < record["models"]["closed form"][measure]
    assert ("α is held" in done.out + done.err) == (kind == "stacked")
