"""Families whose quantized weights lie otherwise than their plain ones: GPT-2's Conv1D, gpt-oss's stacked experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import mapconv
from tests.checkpoint.codecs.encoders import llm_int8, nf4, small_floats
from tests.files import edit_json, read_tensors
from tests.models import merged_by_peft


def train(base: Path, out: Path, **settings) -> Path:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    )
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(out)
    return out


def assert_merges(quantized: Path, twin: Path, adapter: Path, tmp_path: Path) -> None:
    """Against stock PEFT on the twin, which holds the same values in float32."""
    mapconv.merge(adapter, tmp_path / "merged", base=quantized, dtype="float32")
    merged, weights = read_tensors(tmp_path / "merged"), merged_by_peft(twin, adapter)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert merged
    assert not any(report.values())
    for name, tensor in model.state_dict().items():
        assert float((tensor - weights[name]).norm()) <= 1e-6 * float(weights[name].norm())


@pytest.mark.parametrize("encode", [lambda w: nf4(w, double=True), llm_int8], ids=["nf4", "int8"])
@pytest.mark.parametrize("targets", [["c_attn"], ["c_proj"], ["c_fc", "c_proj", "c_attn"]], ids="-".join)
def test_gpt2_is_stored_the_other_way_round(encode, targets, tmp_path):
    """Its ``c_proj`` is square: only values tell it from its transpose."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_inner=24, vocab_size=40, n_positions=64)
    twin, quantized = tmp_path / "twin", tmp_path / "quantized"
    GPT2LMHeadModel(config).save_pretrained(twin)
    stored, values = {}, load_file(twin / "model.safetensors")
    for name, tensor in values.items():
        if ".c_" not in name or tensor.ndim != 2:
            stored[name] = tensor
            continue
        parts, plain = encode(tensor.T.contiguous())  # as the library does, whose layer is a Linear
        values[name] = plain.T.contiguous()
        stored |= {name.removesuffix("weight") + ending: part.clone() for ending, part in parts.items()}
    save_file(values, twin / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(quantized)
    edit_json(quantized / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    assert_merges(
        quantized, twin, train(twin, tmp_path / "lora", target_modules=targets, fan_in_fan_out=True), tmp_path
    )


def test_gpt_oss_experts(tmp_path):
    """Stacks in MXFP4, transposed; an adapter on one of them and on attention, the other stack made plain."""
    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=2, num_local_experts=3, hidden_size=32, intermediate_size=64, head_dim=8, vocab_size=40,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["full_attention"] * 2, num_experts_per_tok=2,
    )  # fmt: skip
    twin, quantized = tmp_path / "twin", tmp_path / "quantized"
    GptOssForCausalLM(config).save_pretrained(twin)
    stored, values = {}, load_file(twin / "model.safetensors")
    for name, tensor in values.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensor
            continue
        matrices = tensor.transpose(1, 2).contiguous()
        experts, height, width = matrices.shape
        parts, plain = small_floats(matrices.view(-1, width), names=("blocks", "scales"), group=32, overall=None)
        stored[f"{name}_blocks"] = parts["blocks"].view(experts, height, width // 32, 16)
        stored[f"{name}_scales"] = parts["scales"].view(experts, height, width // 32)
        values[name] = plain.view(matrices.shape).transpose(1, 2).contiguous()
    save_file(values, twin / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(quantized)
    edit_json(quantized / "config.json", quantization_config={"quant_method": "mxfp4"})
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    assert_merges(quantized, twin, train(twin, tmp_path / "lora", **targets), tmp_path)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config


def test_experts_stored_one_by_one(tmp_path):
    """As transformers 4 wrote them, each in NF4; the class of today stacks them."""
    torch.manual_seed(0)
    config = MixtralConfig(
        num_hidden_layers=1, num_local_experts=3, hidden_size=32, intermediate_size=64, vocab_size=40,
        num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2,
    )  # fmt: skip
    twin, quantized = tmp_path / "twin", tmp_path / "quantized"
    MixtralForCausalLM(config).save_pretrained(twin)
    stored, values = {}, load_file(twin / "model.safetensors")
    experts = [name for name in values if ".experts." in name]
    assert len(experts) == 9
    for name, tensor in values.items():
        stored[name] = tensor
        if name in experts:
            parts, values[name] = nf4(tensor)
            del stored[name]
            stored |= {name.removesuffix("weight") + ending: part.clone() for ending, part in parts.items()}
    save_file(values, twin / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(quantized)
    edit_json(quantized / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    assert_merges(quantized, twin, train(twin, tmp_path / "lora", **targets), tmp_path)
