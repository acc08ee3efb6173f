"""MAP directories as stock PEFT loads them, and as mapconv merges them, against the adapters they came from."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import mapconv
from tests.files import edit_json, edit_tensors, read_tensors
from tests.models import TARGETS, kl, load_adapted, load_base, log_probabilities, merged_by_peft, save_adapter


def divergence(base, source, result) -> float:
    """KL between two adapters as stock PEFT runs them, both in float32."""
    return kl(log_probabilities(load_adapted(base, source)), log_probabilities(load_adapted(base, result)))


def peft_settings(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def map_settings(folder):
    return json.loads((folder / "map_config.json").read_text())


def test_lora_stays_a_plain_lora_with_the_same_outputs(base, lora, tmp_path):
    result = mapconv.upgrade(lora, tmp_path / "map")
    assert divergence(base, lora, tmp_path / "map") <= 1e-8
    assert peft_settings(tmp_path / "map")["use_dora"] is False
    assert {module.base_gain for module in result.modules} == {1.0}
    # s = 2 is a power of two: the factors keep every bit.
    assert result.worst_error == 0.0


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "lora_alpha": 5},
        {"rank_pattern": {"q_proj": 2, "up_proj": 7}, "alpha_pattern": {"k_proj": 3}},
        # PEFT takes the first pattern that matches a path's end: the module "…0.up_proj" must not lose its own.
        {"rank_pattern": {r"layers\.0\.mlp\.up_proj": 7, "up_proj": 5}},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_lora_of_any_scaling_upgrades_and_merges_exactly(settings, base, tmp_path):
    source = save_adapter(base, tmp_path / "source", **settings)
    mapconv.upgrade(source, tmp_path / "map")
    mapconv.merge(tmp_path / "map", tmp_path / "merged", dtype="float32")
    assert divergence(base, source, tmp_path / "map") <= 1e-8
    expected, merged = merged_by_peft(base, source), read_tensors(tmp_path / "merged")
    for name, weight in expected.items():
        # Issue 2's limit: two roundings to float32 (s·B, then the weight), 6e-8 at most each, 3e-8 on average.
        assert float((merged[name].double() - weight).norm() / weight.norm()) <= 1e-7, name


def test_dora_in_its_own_direction_gives_the_same_outputs(base, dora, tmp_path):
    result = mapconv.upgrade(dora, tmp_path / "map", direction="dora")
    assert divergence(base, dora, tmp_path / "map") <= 1e-8
    assert peft_settings(tmp_path / "map")["use_dora"] is True
    assert {module.direction for module in result.modules} == {"dora"}
    mapconv.merge(tmp_path / "map", tmp_path / "merged")
    merged = read_tensors(tmp_path / "merged")
    for name, weight in merged_by_peft(base, dora).items():
        assert float((merged[name].double() - weight).norm() / weight.norm()) <= 1e-7, name


def test_dora_at_its_own_rank_is_far_closer_than_dropping_the_magnitude(base, dora, tmp_path):
    mapconv.upgrade(dora, tmp_path / "map")
    dropped = tmp_path / "dropped"
    dropped.mkdir()
    (dropped / "adapter_config.json").write_bytes((dora / "adapter_config.json").read_bytes())
    (dropped / "adapter_model.safetensors").write_bytes((dora / "adapter_model.safetensors").read_bytes())
    edit_json(dropped / "adapter_config.json", use_dora=False)
    edit_tensors(
        dropped / "adapter_model.safetensors",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "magnitude" in name],
    )
    refitted, without = divergence(base, dora, tmp_path / "map"), divergence(base, dora, dropped)
    assert refitted < without / 2


def test_a_refitted_dora_is_to_peft_what_it_is_to_merge(base, dora, tmp_path):
    mapconv.upgrade(dora, tmp_path / "map")
    mapconv.merge(tmp_path / "map", tmp_path / "merged")
    merged = read_tensors(tmp_path / "merged")
    for name, weight in merged_by_peft(base, tmp_path / "map").items():
        # B = D/a and the magnitude are each rounded to float32, which PEFT multiplies out again.
        assert float((merged[name].double() - weight).norm() / weight.norm()) <= 2e-7, name


def test_recorded_errors_are_those_of_the_written_bytes(base, dora, tmp_path):
    mapconv.upgrade(dora, tmp_path / "map", rank=2)
    start = merged_by_peft(base, dora)
    result, original = merged_by_peft(base, tmp_path / "map"), read_tensors(base)
    for entry in map_settings(tmp_path / "map")["modules"]:
        name = entry["base_tensor"]
        change = (start[name] - original[name].double()).norm()
        error = float((result[name] - start[name]).norm() / change)
        assert entry["error"] == pytest.approx(error, rel=1e-4)
        assert entry["rank"] == 2
        assert entry["base_norm"] == pytest.approx(float(original[name].double().norm()), rel=1e-12)


def test_scalars_say_what_the_merged_weight_is(base, dora, tmp_path):
    """W' = α·W0/‖W0‖ + β·Δ/‖Δ‖ with Δ = BA as stored: equation (1) by hand."""
    mapconv.upgrade(dora, tmp_path / "map")
    factors, original = load_file(tmp_path / "map" / "adapter_model.safetensors"), read_tensors(base)
    result = merged_by_peft(base, tmp_path / "map")
    for entry in map_settings(tmp_path / "map")["modules"]:
        key, W0 = f"base_model.model.{entry['path']}", original[entry["base_tensor"]].double()
        direction = factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
        weight = entry["alpha"] * W0 / W0.norm() + entry["beta"] * direction / direction.norm()
        assert float((weight - result[entry["base_tensor"]]).norm() / weight.norm()) <= 2e-7


def test_lora_compatible_makes_a_plain_lora_of_a_dora(base, dora, tmp_path):
    result = mapconv.upgrade(dora, tmp_path / "map", lora_compatible=True)
    tensors = load_file(tmp_path / "map" / "adapter_model.safetensors")
    assert peft_settings(tmp_path / "map")["use_dora"] is False
    assert not [name for name in tensors if "magnitude" in name]
    assert {module.base_gain for module in result.modules} == {1.0}
    # It is the best plain LoRA: truncated SVD of T − W0.
    start, original = merged_by_peft(base, dora), read_tensors(base)
    for entry in map_settings(tmp_path / "map")["modules"]:
        values = torch.linalg.svdvals(start[entry["base_tensor"]] - original[entry["base_tensor"]].double())
        optimum = float(values[entry["rank"] :].norm() / values.norm())
        assert optimum * (1 - 1e-5) <= entry["error"] <= optimum * 1.01


def test_tolerance_is_kept_with_ranks_that_stock_peft_reads(base, dora, tmp_path):
    result = mapconv.upgrade(dora, tmp_path / "map", tolerance=0.2)
    assert result.worst_error <= 0.2
    ranks = {module.rank for module in result.modules}
    assert len(ranks) > 1
    start, built, original = merged_by_peft(base, dora), merged_by_peft(base, tmp_path / "map"), read_tensors(base)
    for entry in map_settings(tmp_path / "map")["modules"]:
        name = entry["base_tensor"]
        # 1e-4: what float32 factors add to an error of 0.2.
        assert (built[name] - start[name]).norm() <= 0.2001 * (start[name] - original[name].double()).norm()


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_16_bit_factors_and_their_recorded_error(dtype, precision, base, lora, tmp_path):
    result = mapconv.upgrade(lora, tmp_path / "map", dtype=dtype)
    tensors = load_file(tmp_path / "map" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    # Two factors, each rounded by at most half an ulp of its own: `precision` together. Well above rounding of float32.
    assert 2**-20 < result.worst_error <= precision
    built, start, original = merged_by_peft(base, tmp_path / "map"), merged_by_peft(base, lora), read_tensors(base)
    for module in result.modules:
        name = f"{module.path}.weight"
        error = float((built[name] - start[name]).norm() / (start[name] - original[name].double()).norm())
        assert module.error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.1}, {"rank": 2}])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_untrained_adapter_has_no_direction(use_dora, options, base, tmp_path):
    source = tmp_path / "source"
    config = LoraConfig(r=4, target_modules=TARGETS, use_dora=use_dora, task_type="CAUSAL_LM")
    get_peft_model(load_base(base), config).save_pretrained(source)
    result = mapconv.upgrade(source, tmp_path / "map", **options)
    assert result.plain_lora
    assert {(module.beta, module.direction_norm, module.error) for module in result.modules} == {(0.0, 0.0, 0.0)}
    mapconv.merge(tmp_path / "map", tmp_path / "merged")
    merged, original = read_tensors(tmp_path / "merged"), read_tensors(base)
    assert all(torch.equal(merged[name], original[name]) for name in original)


def test_an_upgrade_gives_the_same_bytes_each_time(dora, tmp_path):
    for name in ("first", "second"):
        mapconv.upgrade(dora, tmp_path / name)
    for name in ("adapter_model.safetensors", "adapter_config.json", "map_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
