"""``mapconv rebase --all-linear``: layers that the source leaves alone, ranks from one budget, padded ranks."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

import mapconv
from tests.cli.test_rebase import SIZES, distance, rounded_copy
from tests.cli.test_upgrade_data import write_text
from tests.files import copy, edit_tensors
from tests.models import load_adapted, save_adapter, save_base

RANK = 6


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base, its rounded copy, adapters on q and v alone, and the statistics of the base."""
    folder = tmp_path_factory.mktemp("all-linear")
    base = save_base(folder / "base")
    save_adapter(base, folder / "lora", size=0.05, target_modules=["q_proj", "v_proj"])
    save_adapter(base, folder / "dora", size=0.05, target_modules=["q_proj", "v_proj"], use_dora=True)
    rounded_copy(base, folder / "rounded")
    write_text(folder / "text.txt", 3, 2400)
    mapconv.statistics(base, folder / "stats", data=folder / "text.txt", **SIZES)
    return folder


def rebase(bases, out, source="lora", **options):
    given = {"rank": RANK} | options
    if "statistics_from" not in options:
        given |= {"data": bases / "text.txt", **SIZES}
    onto = given.pop("onto", bases / "rounded")
    return mapconv.rebase(bases / source, out, base=bases / "base", onto=onto, **given)


@pytest.fixture(scope="module")
def spread(bases):
    """The LoRA with every layer repaired, from data; tests must not write there."""
    return rebase(bases, bases / "spread", all_linear=True)


def spent(result):
    """Σ rank·(out + in), and the same of rank 1 everywhere."""
    tensors = load_file(result.out / "adapter_model.safetensors")
    ones = sum(t.shape[1] for n, t in tensors.items() if "lora_A" in n)
    ones += sum(t.shape[0] for n, t in tensors.items() if "lora_B" in n)
    return sum(tensor.numel() for tensor in tensors.values()), ones


@pytest.mark.parametrize(
    ("source", "how"),
    [("lora", {}), ("lora", {"statistics": "source"}), ("lora", {"statistics_from": True}), ("dora", {})],
)
def test_repairing_every_layer_comes_closer_at_the_same_mean_rank(source, how, bases, spread, tmp_path):
    if "statistics_from" in how:
        how = {"statistics_from": bases / "stats"}
    targets = rebase(bases, tmp_path / "targets", source, **how)
    result = rebase(bases, tmp_path / "all", source, all_linear=True, **how) if how or source == "dora" else spread
    only, every = (distance(bases, each.out, bases / "rounded", source) for each in (targets, result))
    assert every < 0.6 * only
    assert len(result.modules) == 14
    numbers, ones = spent(result)
    assert numbers <= RANK * ones
    assert numbers > RANK * ones - 80  # less than the dearest layer's next rank is left
    assert len({module.rank for module in result.modules}) > 1


def test_stock_peft_loads_every_tensor(bases, spread):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        model = load_adapted(bases / "rounded", spread.out)
    live = {
        name.replace(".default", ""): value
        for name, value in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    stored = load_file(spread.out / "adapter_model.safetensors")
    assert live.keys() == stored.keys()
    assert all(torch.equal(live[name], stored[name]) for name in stored)
    assert not any("lm_head" in name or "embed" in name for name in stored)


def test_a_shared_out_rank_serves_better_than_one_for_all(bases, spread, tmp_path):
    # The same layers at one rank each: a zero LoRA on all of them asks for no budget.
    source = save_adapter(bases / "base", tmp_path / "wide", size=0.05)

    def only_q_and_v(tensors):
        for name, tensor in load_file(bases / "lora" / "adapter_model.safetensors").items():
            tensors[name] = tensor
        for name in tensors:
            if "q_proj" not in name and "v_proj" not in name:
                tensors[name] = torch.zeros_like(tensors[name])

    edit_tensors(source / "adapter_model.safetensors", only_q_and_v)
    mapconv.rebase(
        source, tmp_path / "even", base=bases / "base", onto=bases / "rounded", data=bases / "text.txt", rank=RANK,
        **SIZES,
    )  # fmt: skip
    shared_out, even = (distance(bases, out, bases / "rounded", "lora") for out in (spread.out, tmp_path / "even"))
    assert shared_out < even


def test_layers_that_the_other_base_left_alone_are_left_alone(bases, tmp_path):
    copy(bases / "base", tmp_path / "other")

    def change(tensors):
        name = "model.layers.1.mlp.down_proj.weight"
        tensors[name] = tensors[name] + 0.01 * torch.randn(tensors[name].shape, generator=torch.Generator())
        tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1.01

    edit_tensors(tmp_path / "other" / "model.safetensors", change)
    result = rebase(bases, tmp_path / "out", onto=tmp_path / "other", all_linear=True, statistics_from=bases / "stats")
    own = {module.path for module in result.modules} - {
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
    }
    assert own == {"model.layers.1.mlp.down_proj"}


def test_padded_ranks_are_one_rank_and_the_same_function(bases, run, tmp_path):
    for name, more in (("plain", []), ("padded", ["--pad-ranks"])):
        result = run(
            "rebase", bases / "lora", "--base", bases / "base", "--onto", bases / "rounded", "-o", tmp_path / name,
            "--rank", RANK, "--all-linear", "--statistics-from", bases / "stats", *more,
        )  # fmt: skip
        assert result.status == 0, result.err
    config = json.loads((tmp_path / "padded" / "adapter_config.json").read_text())
    plain = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {}
    assert config["r"] == max(plain["r"], *plain["rank_pattern"].values())
    one, other = (distance(bases, tmp_path / name, bases / "rounded", "lora") for name in ("plain", "padded"))
    assert one == pytest.approx(other, rel=1e-4)


def test_layers_that_the_source_left_alone_are_trained_too(bases, spread, tmp_path):
    result = rebase(bases, tmp_path / "out", all_linear=True, calibrate=3)
    training = result.calibration
    assert training.models["calibrated"].kl < training.models["closed form"].kl
    fitted, trained = (load_file(each.out / "adapter_model.safetensors") for each in (spread, result))
    assert fitted.keys() == trained.keys()
    added = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    assert not torch.equal(fitted[added], trained[added])
    assert result.plain_lora


def test_ranks_by_tolerance_need_no_budget(bases, tmp_path):
    options = {"rank": None, "tolerance": 0.5, "statistics_from": bases / "stats"}
    result = rebase(bases, tmp_path / "out", all_linear=True, **options)
    assert len(result.modules) == 14
    assert all(module.output_error <= 0.5 for module in result.modules)


def test_the_sources_own_ranks_are_shared_out_over_its_own_modules(bases, tmp_path):
    result = rebase(bases, tmp_path / "out", rank=None, spread_rank=True, statistics_from=bases / "stats")
    numbers, ones = spent(result)
    assert len(result.modules) == 4
    assert 4 * ones - 64 < numbers <= 4 * ones
