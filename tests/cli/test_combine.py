"""``mapconv combine``: several adapters as one, against dense float64 and, where it is right, stock PEFT."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import mapconv
from mapconv.algebra.mixing import random_key
from mapconv.algebra.stacked import decompose
from mapconv.errors import MapconvError
from mapconv.metadata.provenance import source_fingerprint
from tests.files import copy
from tests.models import load_base, save_adapter, tiny_config

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def adapters(base: Path, lora: Path, dora: Path, models: Path) -> dict[str, Path]:
    """Adapters of each kind; two LoRAs of their own targets, ranks and scalings."""
    made = {"lora": lora, "dora": dora}
    patterns = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    settings = {"seed": 7, "r": 3, "use_rslora": True, "target_modules": ["q_proj", "up_proj"], **patterns}
    made["rslora"] = save_adapter(base, models / "combine-rslora", **settings)
    made["dora2"] = save_adapter(base, models / "combine-dora2", seed=8, r=2, use_dora=True)
    made["map"] = models / "combine-map"
    mapconv.upgrade(dora, made["map"], base=base)
    return made


def change(base: Path, adapter: Path, layer: str = LAYER) -> torch.Tensor:
    """T − W0 in float64, as stock PEFT's own layer forms T."""
    written = (adapter / "adapter_model.safetensors").stat().st_mtime_ns
    module = deepcopy(_adapted(base, adapter, written).get_submodule(f"base_model.model.{layer}"))
    before = module.weight.detach().clone() if not hasattr(module, "base_layer") else module.base_layer.weight.clone()
    if hasattr(module, "merge"):
        module.merge()
        return (module.base_layer.weight - before).detach()
    return torch.zeros_like(before)


@cache
def _adapted(base: Path, adapter: Path, written: int) -> PeftModel:
    return PeftModel.from_pretrained(load_base(base).double(), str(adapter)).double()


def weight(base: Path, layer: str = LAYER) -> torch.Tensor:
    return load_file(base / "model.safetensors")[f"{layer}.weight"].double()


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


def module_of(result, layer: str = LAYER):
    return next(module for module in result.modules if module.path == layer)


@pytest.mark.parametrize("weights", [None, (0.7, -0.4)])
def test_a_sum_of_loras_is_exact(base: Path, adapters: dict[str, Path], tmp_path: Path, weights) -> None:
    parts = [adapters["lora"], adapters["rslora"]]
    result = mapconv.combine(parts, tmp_path / "out", weights=weights)
    assert result.exact
    assert result.plain_lora
    for layer, rank in ((LAYER, 6), ("model.layers.0.self_attn.q_proj", 7), ("model.layers.0.mlp.down_proj", 4)):
        wanted = sum(w * change(base, part, layer) for w, part in zip(weights or (1, 1), parts, strict=True))
        assert distance(change(base, tmp_path / "out", layer), wanted) < 1e-6
        assert module_of(result, layer).rank == rank
    assert result.worst_error < 1e-6


def test_stock_peft_s_own_sum_agrees_where_it_is_right(base: Path, lora: Path, models: Path, tmp_path: Path) -> None:
    other = save_adapter(base, tmp_path / "other", seed=12)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(lora), adapter_name="a")
    model.load_adapter(str(other), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.6, 1.5], "sum", combination_type="cat")
    model.set_adapter("sum")
    mapconv.combine([lora, other], tmp_path / "out", weights=[0.6, 1.5])
    result = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, result(tokens).logits, atol=1e-4)


def test_what_depends_on_the_rest_is_left_out_without_loss(base: Path, lora: Path, tmp_path: Path) -> None:
    result = mapconv.combine([lora, lora, lora], tmp_path / "out", weights=[1, 2, -1.5])
    assert {module.rank for module in result.modules} == {4}
    assert distance(change(base, tmp_path / "out"), 1.5 * change(base, lora)) < 1e-6


def test_what_cancels_leaves_nothing(base: Path, lora: Path, tmp_path: Path) -> None:
    result = mapconv.combine([lora, lora], tmp_path / "out", weights=[1, -1])
    assert {module.rank for module in result.modules} == {1}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    assert decompose(torch.ones(3, 2), torch.zeros(2, 4)).rank == 0


@pytest.mark.parametrize("options", [{"rank": 3}, {"tolerance": 0.3}])
def test_a_sum_of_loras_is_cut_to_the_optimum(base: Path, adapters: dict[str, Path], tmp_path: Path, options) -> None:
    parts = [adapters["lora"], adapters["rslora"]]
    result = mapconv.combine(parts, tmp_path / "out", **options)
    wanted = sum(change(base, part) for part in parts)
    values = torch.linalg.svdvals(wanted).square()
    errors = [float(values[k:].sum() / values.sum()) ** 0.5 for k in range(len(values) + 1)]
    found = module_of(result)
    assert found.error == pytest.approx(errors[found.rank], rel=1e-4)
    assert distance(change(base, tmp_path / "out"), wanted) == pytest.approx(found.error, rel=1e-4)
    if "tolerance" in options:
        assert errors[found.rank] <= 0.3 < errors[found.rank - 1]


@pytest.mark.parametrize("parts", [("dora", "dora2"), ("dora", "lora"), ("map", "dora2", "rslora")])
def test_doras_and_maps_add_what_each_does_alone(base: Path, adapters, tmp_path: Path, parts) -> None:
    weights = [0.8, -0.5, 1.2][: len(parts)]
    result = mapconv.combine([adapters[name] for name in parts], tmp_path / "out", weights=weights, rank=5)
    wanted = sum(w * change(base, adapters[name]) for w, name in zip(weights, parts, strict=True))
    got = change(base, tmp_path / "out")
    found = module_of(result)
    assert distance(got, wanted) == pytest.approx(found.error, rel=1e-3)
    W = weight(base)
    best = min(float(torch.linalg.svdvals(wanted - t * W)[5:].norm()) for t in torch.linspace(-0.4, 0.4, 801).tolist())
    assert found.error == pytest.approx(best / float(wanted.norm()), rel=2e-3)


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "map"])
@pytest.mark.parametrize("method", ["sum", "ties", "dare"])
def test_one_adapter_of_weight_1_gives_its_own_weights_back(base: Path, adapters, tmp_path: Path, name, method) -> None:
    more = {} if method == "sum" else {"density": 1.0}
    mapconv.combine([adapters[name]], tmp_path / "out", method=method, rank=32, **more)
    assert distance(change(base, tmp_path / "out"), change(base, adapters[name])) < 2e-6


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties"])
def test_ties_and_dare_are_those_of_the_dense_changes(base: Path, adapters, tmp_path: Path, method: str) -> None:
    parts, weights = [adapters["lora"], adapters["dora2"], adapters["rslora"]], [1.0, 0.7, -0.5]
    settings = {"weights": weights, "method": method, "density": 0.4, "rank": 32}
    settings |= {} if method == "ties" else {"seed": 3}
    result = mapconv.combine(parts, tmp_path / "out", **settings)
    mixed = []
    for part, w in zip(parts, weights, strict=True):
        dense = change(base, part)
        if method == "ties":
            least = dense.abs().flatten().topk(int(0.4 * dense.numel())).values[-1]
            mixed.append(w * torch.where(dense.abs() >= least, dense, 0.0))
        else:
            mask = (
                _splitmix(random_key(3, source_fingerprint(part), str((LAYER, None))), dense.numel()).view(dense.shape)
                < 0.4
            )
            mixed.append(w * dense * mask / 0.4)
    stack = torch.stack(mixed)
    positive = stack.sum(0) >= 0
    agreeing = torch.where(positive, stack > 0, stack < 0)
    wanted = stack.sum(0) if method == "dare" else (stack * agreeing).sum(0) / agreeing.sum(0).clamp_min(1)
    assert distance(change(base, tmp_path / "out"), wanted) < 1e-5
    again = mapconv.combine(parts, tmp_path / "again", **settings)
    assert [module.alpha for module in again.modules] == [module.alpha for module in result.modules]


def _splitmix(key: int, count: int) -> torch.Tensor:
    """SplitMix64 in Python's own integers."""
    numbers = []
    for i in range(1, count + 1):
        state = (key + i * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(((state ^ (state >> 31)) >> 11) / 2**53)
    return torch.tensor(numbers, dtype=torch.float64)


def test_direction_dora_and_lora_compatible(base: Path, adapters, tmp_path: Path) -> None:
    parts = [adapters["dora"], adapters["dora2"]]
    results = {
        name: mapconv.combine(parts, tmp_path / name, rank=3, **options)
        for name, options in {"free": {}, "lora": {"lora_compatible": True}, "dora": {"direction": "dora"}}.items()
    }
    errors = {name: module_of(result).error for name, result in results.items()}
    assert errors["dora"] < errors["free"] <= errors["lora"]
    assert results["lora"].plain_lora
    wanted = sum(change(base, part) for part in parts)
    for name, error in errors.items():
        assert distance(change(base, tmp_path / name), wanted) == pytest.approx(error, rel=1e-3)


def test_whole_tensors_that_disagree(base: Path, tmp_path: Path) -> None:
    a, b = (save_adapter(base, tmp_path / n, seed=s, modules_to_save=["lm_head"]) for n, s in (("a", 1), ("b", 2)))
    key = "base_model.model.lm_head.weight"
    for folder, factor in ((a, 2.0), (b, 4.0)):
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(tensors | {key: tensors[key] * factor}, folder / "adapter_model.safetensors")
    with pytest.raises(MapconvError, match=r"other values for lm_head\.weight.*--whole first"):
        mapconv.combine([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    for rule, factor in (("first", 2.0), ("b", 4.0), ("mean", 2.5)):
        made = mapconv.combine([a, b], tmp_path / "made", whole=rule, weights=[3, 1], force=True)
        mapconv.merge(made.out, tmp_path / "merged", base=base, force=True)
        merged = load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"]
        assert torch.allclose(merged, factor * head, rtol=1e-6)
    with pytest.raises(MapconvError, match="--whole c names none"):
        mapconv.combine([a, b], tmp_path / "out", whole="c")
    alone = mapconv.combine([save_adapter(base, tmp_path / "c"), b], tmp_path / "alone")
    assert (alone.carried, "alone" in " ".join(alone.notes)) == (1, True)


def test_biases_of_loras_add_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(attention_bias=True)).save_pretrained(tmp_path / "base")
    parts = [
        save_adapter(tmp_path / "base", tmp_path / name, seed=seed, target_modules=["q_proj"], lora_bias=name == "b")
        for name, seed in (("a", 1), ("b", 2))
    ]
    tensors = load_file(parts[1] / "adapter_model.safetensors")
    biases = {name: torch.arange(len(value)).float() for name, value in tensors.items() if name.endswith("bias")}
    assert biases
    save_file(tensors | biases, parts[1] / "adapter_model.safetensors")
    mapconv.combine(parts, tmp_path / "out", weights=[1, 0.5])
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, value in biases.items():
        assert torch.allclose(made[name], 0.5 * 2 * value)  # alpha / r = 2


def test_adapters_of_other_bases_are_told_by_their_norms(
    base: Path, other_base: Path, adapters, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    mapconv.upgrade(save_adapter(other_base, tmp_path / "lora"), foreign, base=other_base)
    with pytest.raises(MapconvError, match=r"the MAP adapter was made for a base where .*combine adapters of one"):
        mapconv.combine([adapters["lora"], foreign], tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    forced = mapconv.combine([adapters["lora"], foreign], tmp_path / "out", base=base, force=True)
    assert [note for note in forced.notes if note.startswith("accepted with --force: ") and str(foreign) in note]


def test_nan_and_a_missing_adapter(base: Path, lora: Path, tmp_path: Path) -> None:
    broken = copy(lora, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(MapconvError, match="holds NaN or infinity"):
        mapconv.combine([lora, broken], tmp_path / "out")
    with pytest.raises(MapconvError):
        mapconv.combine([lora, tmp_path / "none"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(run, base: Path, adapters, tmp_path: Path) -> None:
    parts, out = [adapters["lora"], adapters["rslora"]], tmp_path / "out"
    assert run("combine", *parts, "-o", out, "--dry-run").status == 0
    assert not out.exists()
    made = run("combine", *parts, "--weights", "0.5,2", "-o", out, "-q")
    assert made.status == 0, made.err
    assert "0.5 × " in made.out
    assert "a plain LoRA" in made.out
    again = run("combine", *parts, "-o", out, "-q", "--force", "--json", "--rank", 2)
    assert json.loads(again.out)["worst_error"] > 0.1
    assert run("inspect", out).status == 0
    assert (out / "README.md").read_text().count("| adapter |") == 2
    for wrong in (
        ["--density", 0.5], ["--method", "ties"], ["--method", "ties", "--density", 1.5], ["--weights", "1"],
        ["--method", "ties", "--density", 0.5, "--seed", 1], ["--rank", 2, "--tolerance", 0.1], ["--method", "slerp"],
    ):  # fmt: skip
        assert run("combine", *parts, "-o", out, "--force", *wrong).status == 2, wrong
