"""``mapconv extract``: what a finetune changed comes back when the adapter is merged, to the optimum of its rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

import mapconv
from mapconv.errors import MapconvError
from tests.files import copy
from tests.models import save_tokenizer, tiny_config

Weights = dict[str, torch.Tensor]


def weights_of(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def finetuned(base: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    """A copy of a model with other weights; ``change`` gives None for those that stay."""
    copy(base, out)
    weights = weights_of(base)
    changed = {name: change(name, weight) for name, weight in weights.items()}
    merged = {name: weights[name] if new is None else new.contiguous() for name, new in changed.items()}
    save_file(merged, out / "model.safetensors", {"format": "pt"})
    return out


def everywhere(name: str, weight: torch.Tensor) -> torch.Tensor | None:
    """A change of every tensor but one, as training in full makes it."""
    if "layers.1.self_attn.v_proj" in name:
        return None
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    return (weight.float() + 0.02 * noise).to(weight.dtype)


@pytest.fixture(scope="module")
def tuned(base: Path, models: Path) -> Path:
    return finetuned(base, models / "tuned", everywhere)


def test_extract_at_full_rank_and_merge_gives_the_finetune_back(base: Path, tuned: Path, tmp_path: Path) -> None:
    result = mapconv.extract(tuned, tmp_path / "out", base=base, rank=32)
    assert (result.refitted, result.carried, result.unchanged) == (14, 6, 1)
    mapconv.merge(tmp_path / "out", tmp_path / "merged", base=base)
    W, T, merged = weights_of(base), weights_of(tuned), weights_of(tmp_path / "merged")
    assert merged.keys() == T.keys()
    for name in T:
        if T[name].ndim == 1 or "lm_head" in name or "layers.1.self_attn.v_proj" in name:
            assert torch.equal(merged[name], T[name]), name
        else:
            assert (merged[name] - T[name]).norm() < 1e-6 * (T[name] - W[name]).norm(), name


def test_stock_peft_computes_the_finetune(base: Path, tuned: Path, tmp_path: Path) -> None:
    mapconv.extract(tuned, tmp_path / "out", base=base, rank=32)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        got, wanted = model(tokens).logits, AutoModelForCausalLM.from_pretrained(tuned)(tokens).logits
        with model.disable_adapter():
            off, plain = model(tokens).logits, AutoModelForCausalLM.from_pretrained(base)(tokens).logits
    assert torch.allclose(got, wanted, atol=1e-4)
    assert torch.equal(off, plain)


@pytest.mark.parametrize("lora_compatible", [False, True])
def test_each_module_is_the_optimum_of_float64_decompositions(
    base: Path, tuned: Path, tmp_path: Path, lora_compatible: bool
) -> None:
    result = mapconv.extract(tuned, tmp_path / "out", base=base, rank=4, lora_compatible=lora_compatible)
    W, T = weights_of(base), weights_of(tuned)
    for module in result.modules:
        name = f"{module.path}.weight"
        change, weight = (T[name].double() - W[name].double()), W[name].double()
        gains = [0.0] if lora_compatible else torch.linspace(-0.05, 0.05, 401).tolist()
        best = min(float(torch.linalg.svdvals(change - t * weight)[4:].square().sum()) for t in gains) ** 0.5
        assert module.error == pytest.approx(best / float(change.norm()), rel=2e-3)
        assert module.change == pytest.approx(float(change.norm() / weight.norm()), rel=1e-5)
    assert result.plain_lora == lora_compatible


def test_a_finetune_that_is_a_lora_is_found_at_its_rank(base: Path, lora: Path, tmp_path: Path) -> None:
    mapconv.merge(lora, tmp_path / "tuned", base=base)
    result = mapconv.extract(tmp_path / "tuned", tmp_path / "out", base=base, tolerance=1e-3)
    assert {module.rank for module in result.modules} == {4}
    assert result.worst_error < 1e-3
    assert result.carried == 0


def test_a_tolerance_spends_no_rank_on_rounding(half_base: Path, base: Path, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)

    def low_rank(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if "_proj" not in name:
            return None
        B, A = torch.randn(weight.shape[0], 3, generator=draw), torch.randn(3, weight.shape[1], generator=draw)
        return (weight.float() + 0.003 * B @ A).to(torch.bfloat16)

    tuned = finetuned(half_base, tmp_path / "tuned", low_rank)
    result = mapconv.extract(tuned, tmp_path / "out", base=half_base, tolerance=0.02)
    assert {module.rank for module in result.modules} == {3}
    for module in result.modules:
        # The update is of rank 3 but for rounding, so that what is left over is the rounding.
        assert module.floor == pytest.approx(module.error, rel=0.25)
        assert module.floor > 0.02


def test_direction_dora_keeps_the_row_norms(base: Path, tuned: Path, tmp_path: Path) -> None:
    result = mapconv.extract(tuned, tmp_path / "out", base=base, rank=4, direction="dora")
    plain = mapconv.extract(tuned, tmp_path / "plain", base=base, rank=4, lora_compatible=True)
    T, stored = weights_of(tuned), load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module, other in zip(result.modules, plain.modules, strict=True):
        path = module.path
        weight = T[f"{path}.weight"] if "embed" not in path else T[f"{path}.weight"].T
        magnitude = stored[f"base_model.model.{path}.lora_magnitude_vector"]
        assert torch.allclose(magnitude, weight.norm(dim=1), rtol=1e-6)
        assert module.error <= other.error
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    before = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    wanted = T["model.layers.0.mlp.up_proj.weight"]
    error = (layer.get_base_layer().weight - wanted).norm() / (wanted - before).norm()
    found = next(m for m in result.modules if m.path == "model.layers.0.mlp.up_proj")
    assert float(error) == pytest.approx(found.error, rel=1e-3)
    within = mapconv.extract(tuned, tmp_path / "within", base=base, tolerance=0.3, direction="dora")
    assert within.worst_error <= 0.3


def test_data_brings_the_outputs_closer(base: Path, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and a dog ran by. " * 100)
    settings = {"base": base, "rank": 4, "dtype": "float32"}
    plain = mapconv.extract(tuned, tmp_path / "plain", **settings)
    result = mapconv.extract(tuned, tmp_path / "out", data=tmp_path / "text.txt", samples=8, **settings)
    assert result.modules[1].output_error < result.modules[1].error
    kl = [mapconv.verify(folder, tuned, data=tmp_path / "text.txt").kl for folder in (result.out, plain.out)]
    assert kl[0] < kl[1]


def test_targets_and_exclude_are_peft_s(base: Path, tuned: Path, tmp_path: Path) -> None:
    result = mapconv.extract(
        tuned, tmp_path / "a", base=base, targets="q_proj,mlp.up_proj", exclude="norm,layers.1.mlp.up_proj"
    )
    paths = {module.path for module in result.modules}
    assert paths == {"model.layers.0.mlp.up_proj", *(f"model.layers.{n}.self_attn.q_proj" for n in (0, 1))}
    # The final norm is named; those of the layers are not.
    assert (result.carried, result.left) == (4, 13)
    result = mapconv.extract(tuned, tmp_path / "b", base=base, targets=r".*layers\.0.*_proj", rank=2)
    assert len(result.modules) == 7
    with pytest.raises(MapconvError, match="--targets query names no module that differs: those are"):
        mapconv.extract(tuned, tmp_path / "c", base=base, targets="query")


def _tied(base: Path, out: Path, vocabulary: int = 64, *, seed: int, tie: bool = True) -> Path:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=tie))
    if base is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(base).state_dict())
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(out)
    save_tokenizer(out)
    return out


@pytest.mark.parametrize(("vocabulary", "tie"), [(64, True), (70, True), (64, False)])
def test_tied_ends_and_a_grown_vocabulary_come_back_as_the_finetune_has_them(
    tmp_path: Path, vocabulary: int, tie: bool
) -> None:
    base = _tied(None, tmp_path / "base", seed=1)
    tuned = _tied(base, tmp_path / "tuned", vocabulary, seed=2, tie=tie)
    mapconv.extract(tuned, tmp_path / "out", base=base, rank=32)
    mapconv.merge(tmp_path / "out", tmp_path / "merged", base=base)
    tokens = torch.arange(3, 43)[None]
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tuned, tmp_path / "merged")]
    with torch.no_grad():
        wanted, got = (model(tokens).logits for model in models)
    assert torch.allclose(wanted, got, atol=1e-4)
    assert torch.equal(*(model.get_input_embeddings().weight for model in models))
    tied = [model.get_input_embeddings().weight is model.get_output_embeddings().weight for model in models]
    assert tied == [tie, tie]


def test_a_classifier_with_a_new_head(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    save_tokenizer(tmp_path / "tuned")
    result = mapconv.extract(tmp_path / "tuned", tmp_path / "out", base=base, rank=32)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    mapconv.merge(result.out, tmp_path / "merged", base=base)
    merged = LlamaForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.score.weight, model.score.weight)
    report = mapconv.verify(result.out, tmp_path / "tuned", base=base)
    assert report.kl < 1e-9


def test_a_model_without_a_class_is_known_by_its_names(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    base = {
        "down.conv.weight": torch.randn(12, 8, 3, 3, generator=draw), "down.conv.bias": torch.randn(12, generator=draw),
        "mid.to_q.weight": torch.randn(16, 10, generator=draw), "mid.norm.weight": torch.randn(16, generator=draw),
    }  # fmt: skip
    tuned = {name: weight + 0.05 * torch.randn(weight.shape, generator=draw) for name, weight in base.items()}
    for name, weights in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    result = mapconv.extract(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base", rank=16)
    assert (result.refitted, result.carried) == (2, 2)
    mapconv.merge(tmp_path / "out", tmp_path / "merged", base=tmp_path / "base")
    merged = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    for name, weight in tuned.items():
        assert torch.allclose(merged[name], weight, atol=1e-5), name


def test_the_table_the_dry_run_and_json(run, base: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = run("extract", tuned, "--base", base, "-o", out, "--dry-run")
    assert planned.status == 0, planned.err
    assert "14 weights" in planned.out
    assert not out.exists()
    table = run("extract", tuned, "--base", base, "-o", out, "-q")
    assert table.status == 0, table.err
    assert "rounding" in table.out
    again = run("extract", tuned, "--base", base, "-o", out, "-q", "--force", "--json")
    assert len(json.loads(again.out)["modules"]) == 14
    shown = run("inspect", out, "--base", base)
    assert shown.status == 0, shown.err
    assert "full finetune" in (out / "README.md").read_text()
