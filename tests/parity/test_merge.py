"""Merged checkpoints against stock PEFT's merge_and_unload, in float64, float32 and bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mapconv
from tests.files import read_header, read_tensors
from tests.models import load_adapted, load_base, log_probabilities, merged_by_peft, prompts, save_adapter


def relative_errors(merged: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: float((merged[name].double() - weight.double()).norm() / weight.double().norm())
        for name, weight in expected.items()
    }


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_weights_in_float32_are_those_of_peft_in_float64(method, base, request, tmp_path):
    adapter = request.getfixturevalue(method)
    mapconv.merge(adapter, tmp_path / "merged")
    merged = read_tensors(tmp_path / "merged")
    expected = merged_by_peft(base, adapter)
    assert merged.keys() == expected.keys()
    # Rounding a result once costs at most 2^-24 = 6e-8 of each weight; 1e-7 leaves the rest to both sums.
    assert max(relative_errors(merged, expected).values()) <= 1e-7


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_logits_are_those_of_peft(method, base, request, tmp_path):
    adapter = request.getfixturevalue(method)
    mapconv.merge(adapter, tmp_path / "merged")
    with torch.inference_mode():
        ours = load_base(tmp_path / "merged")(prompts()).logits
        unmerged = load_adapted(base, adapter)(prompts()).logits
        merged = load_adapted(base, adapter).merge_and_unload()(prompts()).logits
        exact = load_adapted(base, adapter, torch.float64)(prompts()).logits
    # PEFT's own float32 result is this far from float64; ours, rounded in other places, may be twice as far.
    rounding = float((merged.double() - exact).abs().max())
    assert float((ours.double() - exact).abs().max()) <= 2 * rounding
    assert float((ours - unmerged).abs().max()) <= 4 * rounding


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_bfloat16_weights_are_the_float64_result_rounded_once(method, half_base, request, tmp_path):
    adapter = request.getfixturevalue(method)
    mapconv.merge(adapter, tmp_path / "merged", base=half_base)
    merged, exact = read_tensors(tmp_path / "merged"), merged_by_peft(half_base, adapter)
    adapted = [name for name in exact if "_proj" in name]
    equal = sum(int((merged[name] == exact[name].bfloat16()).sum()) for name in adapted)
    # A float32 result lands on the other side of a rounding boundary with a chance of about 2^-24 / 2^-9.
    assert equal / sum(exact[name].numel() for name in adapted) >= 0.999
    assert all(weight.dtype == torch.bfloat16 for weight in merged.values())


def test_untouched_tensors_keep_their_bytes(half_base, lora, tmp_path):
    mapconv.merge(lora, tmp_path / "merged", base=half_base)
    before, after = read_tensors(half_base), read_tensors(tmp_path / "merged")
    for name in before:
        assert torch.equal(before[name], after[name]) == ("_proj" not in name), name


def test_float32_output_of_a_bfloat16_base_loses_nothing(half_base, dora, tmp_path):
    mapconv.merge(dora, tmp_path / "merged", base=half_base, dtype="float32")
    merged = read_tensors(tmp_path / "merged")
    assert {weight.dtype for weight in merged.values()} == {torch.float32}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
    assert max(relative_errors(merged, merged_by_peft(half_base, dora)).values()) <= 1e-7


def test_shards_of_the_base_are_kept(sharded, lora, tmp_path):
    result = mapconv.merge(lora, tmp_path / "merged", base=sharded)
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(names) > 2
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == names == sorted(result.files)
    for name in names:
        assert list(read_header(tmp_path / "merged" / name)[0]) == list(read_header(sharded / name)[0])


def test_sharded_and_single_bases_merge_to_the_same_weights(base, sharded, dora, tmp_path):
    mapconv.merge(dora, tmp_path / "single", base=base)
    mapconv.merge(dora, tmp_path / "shards", base=sharded)
    single, shards = read_tensors(tmp_path / "single"), read_tensors(tmp_path / "shards")
    assert single.keys() == shards.keys()
    assert all(torch.equal(single[name], shards[name]) for name in single)
    # transformers finds every tensor through the index, or it would draw random ones.
    assert torch.equal(
        log_probabilities(load_base(tmp_path / "single")), log_probabilities(load_base(tmp_path / "shards"))
    )


def test_max_shard_size_limits_each_file_and_the_index_counts_bytes(base, lora, tmp_path):
    limit = 20_000
    result = mapconv.merge(lora, tmp_path / "merged", max_shard_size=limit)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    tensors = read_tensors(tmp_path / "merged")
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert set(index["weight_map"].values()) == set(result.files)
    for name in result.files:
        header, data = read_header(tmp_path / "merged" / name)
        assert len(data) <= limit or len(header.keys() - {"__metadata__"}) == 1
    load_base(tmp_path / "merged")


def test_shards_melt_into_one_file_where_the_limit_allows(sharded, lora, tmp_path):
    result = mapconv.merge(lora, tmp_path / "merged", base=sharded, max_shard_size=10**9)
    assert result.files == ("model.safetensors",)
    expected = merged_by_peft(sharded, lora)
    assert max(relative_errors(read_tensors(tmp_path / "merged"), expected).values()) <= 1e-7
    load_base(tmp_path / "merged")


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {r"layers\.0\..*": 3}},
        {"use_dora": True, "rank_pattern": {"down_proj": 1}, "use_rslora": True},
        {"target_modules": r".*layers\.1\.(self_attn\.[qv]_proj|mlp\.down_proj)"},
        {"target_modules": "all-linear", "lora_alpha": -5},
        {"layers_to_transform": [1]},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_scaling_rules_and_targets_are_those_of_peft(settings, base, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    mapconv.merge(adapter, tmp_path / "merged")
    expected = merged_by_peft(base, adapter)
    assert max(relative_errors(read_tensors(tmp_path / "merged"), expected).values()) <= 1e-7


def test_adapters_in_16_bit_are_read_as_they_are(base, lora, tmp_path):
    adapter = tmp_path / "adapter"
    model = load_adapted(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    model.save_pretrained(adapter)
    mapconv.merge(adapter, tmp_path / "merged", base=base)
    expected = merged_by_peft(base, adapter)
    assert max(relative_errors(read_tensors(tmp_path / "merged"), expected).values()) <= 1e-7


def test_the_merged_folder_carries_what_from_pretrained_needs_and_no_more(own_base, lora, tmp_path):
    for name in ("optimizer.pt", "training_args.bin", ".env", "trainer_state.json"):
        (own_base / name).write_text("secret")
    mapconv.merge(lora, tmp_path / "merged", base=own_base)
    names = {path.name for path in Path(tmp_path / "merged").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "map_merge.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
