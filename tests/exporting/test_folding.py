"""What a reader does not take is merged into a base beside the adapter: both together compute what the source does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import mapconv
from mapconv.checkpoint import staging
from tests.files import listing
from tests.matrix.bases import Bases
from tests.matrix.models import MODELS
from tests.models import load_adapted, log_probabilities, save_adapter, save_tokenizer, tiny_config


@pytest.fixture(scope="module")
def biased(tmp_path_factory) -> Path:
    """A Llama whose attention has biases."""
    folder = tmp_path_factory.mktemp("folding") / "biased"
    torch.manual_seed(2)
    model = LlamaForCausalLM(tiny_config(attention_bias=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def with_biases(base: Path, out: Path) -> Path:
    source = save_adapter(base, out, target_modules=["q_proj", "v_proj"], lora_bias=True)
    tensors = load_file(source / "adapter_model.safetensors")
    changed = {name: torch.linspace(-1, 1, t.numel()) for name, t in tensors.items() if name.endswith("lora_B.bias")}
    save_file(tensors | changed, source / "adapter_model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize(
    ("kind", "server", "left"),
    [
        ("biases", "vllm", "model.layers.0.self_attn.q_proj.lora_B.bias"),
        ("embeddings", "sglang", "model.embed_tokens"),
    ],
)
def test_both_together_compute_what_the_source_does(kind, server, left, base, biased, tmp_path):
    if kind == "biases":
        base, source = biased, with_biases(biased, tmp_path / "own")
    else:
        source = save_adapter(base, tmp_path / "own", target_modules=["q_proj", "embed_tokens"])
    result = mapconv.export(source, tmp_path / "out", server=server, base=base, fold_into=tmp_path / "folded")
    assert left in result.folded
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any("bias" in name or "embed_tokens" in name for name in names)
    torch.testing.assert_close(
        log_probabilities(load_adapted(tmp_path / "folded", tmp_path / "out")),
        log_probabilities(load_adapted(base, source)),
        rtol=0,
        atol=2e-4,
    )


def test_experts_go_into_the_base(tmp_path):
    tiny, base = MODELS["qwen3-moe"], Bases(tmp_path / "bases").folder("qwen3-moe", "default")
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = get_peft_model(tiny.load(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "own")
    result = mapconv.export(
        tmp_path / "own", tmp_path / "out", server="tensorrt-llm", base=base, fold_into=tmp_path / "folded"
    )
    assert set(result.folded) == {f"model.layers.{layer}.mlp.experts" for layer in range(2)}
    both = PeftModel.from_pretrained(tiny.load(tmp_path / "folded"), str(tmp_path / "out"))
    torch.testing.assert_close(tiny.logits(both), tiny.logits(model), rtol=0, atol=1e-4)


def test_an_adapter_that_cannot_be_put_in_place_leaves_no_base(base, tmp_path, monkeypatch, run):
    source = save_adapter(base, tmp_path / "own", target_modules=["q_proj", "embed_tokens"])
    place = staging.put_in_place

    def full(folder: Path, out: Path, *, force: bool) -> None:
        if out.name == "out":
            raise OSError(28, "No space left on device", str(out))
        place(folder, out, force=force)

    before = listing(tmp_path)
    arguments = ("export", source, "--for", "sglang", "--base", base, "-o", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(staging, "put_in_place", full)
        assert run(*arguments, "--fold-into", tmp_path / "folded").status == 1
    assert listing(tmp_path) == before
    with monkeypatch.context() as patch:
        # As a kill between the two leaves them.
        patch.setattr(staging, "put_in_place", full)
        patch.setattr(staging, "take_back", lambda *paths: None)
        run(*arguments, "--fold-into", tmp_path / "folded")
    assert (tmp_path / "folded").exists()
    wrong = run(*arguments[:-1], tmp_path / "elsewhere", "--fold-into", tmp_path / "folded")
    assert (wrong.status, "exists already" in wrong.err) == (1, True)
    assert run(*arguments, "--fold-into", tmp_path / "folded").status == 0
    assert (tmp_path / "folded" / "model.safetensors").exists()
    assert not [path.name for path in (tmp_path / "folded").iterdir() if path.name.startswith(".")]
