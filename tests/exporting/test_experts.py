"""Experts written in every layout, beside what stock PEFT and MLX-LM make of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.checkpoint.gguf.header import GgufFile, read_gguf
from mapconv.errors import UnsupportedError
from tests.files import copy, edit_json
from tests.matrix.bases import Bases
from tests.matrix.models import MODELS

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def stack(bases, tmp_path_factory) -> Path:
    """A LoRA on transformers 5's fused experts, and on the attention at another rank."""
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
        rank_pattern={"q_proj": 3},
    )
    torch.manual_seed(1)
    model = get_peft_model(MODELS["qwen3-moe"].load(bases.folder("qwen3-moe", "fused")), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("adapters") / "stack"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def apart(bases, tmp_path_factory) -> Path:
    """One LoRA for each projection of each expert, of which gate and up differ in rank and scaling."""
    folder = tmp_path_factory.mktemp("adapters") / "apart"
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, weight in load_file(bases.folder("qwen3-moe", "default") / "model.safetensors").items():
        if ".experts." in name:
            rank = 3 if ".up_proj" in name else 2
            path = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "rank_pattern": {"up_proj": 3}, "task_type": "CAUSAL_LM"}
    config["target_modules"] = ["gate_proj", "up_proj", "down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged_by_peft(base: Path, adapter: Path) -> Weights:
    """The live model's merged weights, in float64."""
    model = PeftModel.from_pretrained(MODELS["qwen3-moe"].load(base).double(), str(adapter)).double()
    return model.merge_and_unload().state_dict()


def merged(adapter: Path, base: Path, out: Path) -> Weights:
    """By mapconv, with the names of a base whose experts are fused."""
    mapconv.merge(adapter, out, base=base)
    return load_file(out / "model.safetensors")


def assert_same(got: Weights, wanted: Weights, tolerance: float = 3e-6) -> None:
    assert got.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name].double(), weight.double(), rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("layout", ["split", "fused", "tinker", "sglang"])
@pytest.mark.parametrize("spelling", ["default", "fused"])
def test_a_stack_in_every_layout(layout, spelling, stack, bases, tmp_path):
    base, fused = bases.folder("qwen3-moe", spelling), bases.folder("qwen3-moe", "fused")
    result = mapconv.export(stack, tmp_path / "out", to="peft", experts=layout, base=base)
    assert result.worst_error < 1e-7
    wanted = merged_by_peft(fused, stack)
    if layout in ("split", "fused"):
        assert_same(merged_by_peft(fused, tmp_path / "out"), wanted)
    assert_same(merged(tmp_path / "out", fused, tmp_path / "merged"), wanted)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    named = {"split": ["down_proj", "gate_proj", "q_proj", "up_proj"], "fused": ["q_proj"], "tinker": "all-linear"}
    assert config["target_modules"] == named.get(layout, ["down_proj", "gate_up_proj", "q_proj"])


def test_apart_to_fused_has_the_sum_of_the_ranks(apart, bases, tmp_path):
    fused = bases.folder("qwen3-moe", "fused")
    assert mapconv.export(apart, tmp_path / "out", to="peft", experts="fused", base=fused).worst_error < 1e-7
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"] == (3 * (2 + 3), 16)
    assert shapes["base_model.model.model.layers.0.mlp.experts.lora_A.weight"] == (3 * 2, 12)
    wanted = merged(apart, fused, tmp_path / "merged")
    assert_same(merged_by_peft(fused, tmp_path / "out"), wanted)
    # And back: each part then has the rank of both.
    assert mapconv.export(tmp_path / "out", tmp_path / "back", to="peft", experts="split", base=fused).rank == 5
    assert_same(merged_by_peft(fused, tmp_path / "back"), wanted)


def test_truncated_the_error_is_what_is_lost(apart, bases, tmp_path):
    fused = bases.folder("qwen3-moe", "fused")
    result = mapconv.export(apart, tmp_path / "out", to="peft", experts="fused", base=fused, rank=3)
    before, wanted = load_file(fused / "model.safetensors"), merged(apart, fused, tmp_path / "merged")
    got = merged_by_peft(fused, tmp_path / "out")
    for item in result.modules:
        leaf = "gate_up_proj" if item.path.endswith("base_layer") else "down_proj"
        name = f"{item.path.removesuffix('.base_layer')}.{leaf}"
        lost = got[name][item.expert] - wanted[name][item.expert]
        change = (wanted[name][item.expert] - before[name][item.expert]).double()
        assert float(lost.norm() / change.norm()) == pytest.approx(item.error, abs=1e-6)
        best = torch.linalg.svdvals(change)[3:].norm() / change.norm()
        assert item.error == pytest.approx(float(best), abs=1e-5)
    assert 0.1 < result.worst_error < 1


@pytest.mark.parametrize("command", ["export", "upgrade"])
def test_a_tolerance_gives_a_stack_the_rank_of_its_worst_expert(command, bases, tmp_path):
    """Expert 0 needs rank 1, expert 1 both of its own, and expert 2 is not adapted."""
    fused, own = bases.folder("qwen3-moe", "fused"), tmp_path / "own"
    own.mkdir()
    path = "base_model.model.model.layers.1.mlp.experts"
    A, B = torch.eye(6, 12), torch.zeros(16, 2, 3)
    B[0, 0, 0], B[1:3, :, 1] = 2.0, torch.eye(2)
    save_file({f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B.flatten(1)}, own / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "task_type": "CAUSAL_LM", "target_modules": []}
    config["target_parameters"] = ["model.layers.1.mlp.experts.down_proj"]
    (own / "adapter_config.json").write_text(json.dumps(config))
    if command == "export":
        result = mapconv.export(own, tmp_path / "out", to="peft", base=fused, tolerance=1e-3)
    else:
        result = mapconv.upgrade(own, tmp_path / "out", base=fused, tolerance=1e-3)
    assert [module.rank for module in result.modules] == [2, 2, 2]
    assert_same(merged_by_peft(fused, tmp_path / "out"), merged_by_peft(fused, own))
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")[f"{path}.lora_B.weight"].view(16, 2, 3)
    assert int(torch.linalg.matrix_rank(written[:, :, 0])) == 1


def test_missing_experts_are_zeros_where_they_may_be(apart, bases, tmp_path):
    fused, own = bases.folder("qwen3-moe", "fused"), copy(apart, tmp_path / "own")
    tensors = load_file(own / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if ".experts.1." not in k}, own / "adapter_model.safetensors")
    edit_json(own / "adapter_config.json", target_modules=r".*experts\.[02]\..*")
    mapconv.export(own, tmp_path / "out", to="peft", experts="fused", base=fused)
    assert_same(merged_by_peft(fused, tmp_path / "out"), merged(own, fused, tmp_path / "merged"))
    with pytest.raises(UnsupportedError, match=r"adapts 2 of 3 experts in model\.layers\.0"):
        mapconv.export(own, tmp_path / "3d", to="peft", experts="tinker", base=fused)


def test_vllm_gets_experts_one_by_one(stack, bases, tmp_path, run):
    fused = bases.folder("qwen3-moe", "fused")
    assert run("export", stack, "--for", "vllm", "--base", fused, "-o", tmp_path / "out").status == 0
    assert any(".experts.2.up_proj." in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert run("export", tmp_path / "out", "--for", "vllm", "--check").status == 0
    assert_same(merged_by_peft(fused, tmp_path / "out"), merged_by_peft(fused, stack))
    wrong = run("export", stack, "--for", "vllm", "--experts", "tinker", "--base", fused, "-o", tmp_path / "x")
    assert (wrong.status, "it takes split" in wrong.err) == (1, True)
    wrong = run("export", stack, "--to", "mlx", "--experts", "split", "--base", fused, "-o", tmp_path / "x")
    assert (wrong.status, "has its own" in wrong.err) == (1, True)


@pytest.mark.parametrize("source", ["stack", "apart"])
def test_mlx_lm_loads_its_own_stacks(source, bases, tmp_path, request):
    base, fused = (bases.folder("qwen3-moe", spelling) for spelling in ("default", "fused"))
    adapter = request.getfixturevalue(source)
    mapconv.export(adapter, tmp_path / "out", to="mlx", base=base)
    wanted = merged(adapter, fused, tmp_path / "wanted")
    assert_same(merged(tmp_path / "out", fused, tmp_path / "merged"), wanted)
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.tuner.utils")
    from mlx_lm.utils import load_model

    # It reads the configurations of transformers 4.
    old = copy(base, tmp_path / "old")
    edit_json(old / "config.json", num_experts=3, rope_theta=10000.0)
    model, _ = load_model(old)
    utils.load_adapters(model, str(tmp_path / "out"))
    for path, module in model.named_modules():
        if ".switch_mlp." in path and hasattr(module, "fuse"):
            weight = torch.tensor(module.fuse().weight.astype(mx.float32).tolist())
            parent, leaf = path.replace(".switch_mlp.", ".experts.").rsplit(".", 1)
            stacked = wanted[f"{parent}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"]
            parts = {"gate_proj": stacked[:, :12], "up_proj": stacked[:, 12:], "down_proj": stacked}
            torch.testing.assert_close(weight, parts[leaf], rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", ["stack", "apart"])
def test_llama_cpp_gets_a_stack_for_each_projection(source, bases, tmp_path, request):
    base, fused = (bases.folder("qwen3-moe", spelling) for spelling in ("default", "fused"))
    adapter = request.getfixturevalue(source)
    result = mapconv.export(adapter, tmp_path / "out.gguf", server="llama.cpp", base=base)
    assert result.worst_error < 1e-7
    before, wanted = load_file(base / "model.safetensors"), merged(adapter, fused, tmp_path / "wanted")
    got = merged(tmp_path / "out.gguf", base, tmp_path / "merged")
    header = read_gguf(tmp_path / "out.gguf")
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    for layer in range(2):
        for role, width, height in (("gate", 16, 12), ("up", 16, 12), ("down", 12, 16)):
            name = f"blk.{layer}.ffn_{role}_exps.weight"
            assert shapes[f"{name}.lora_a"] == (3, result.rank, width)
            assert shapes[f"{name}.lora_b"] == (3, height, result.rank)
            # As llama.cpp multiplies them: the matrices of the chosen expert, alpha by the rank of lora_b.
            A, B = (values_of(header, f"{name}.{part}") for part in ("lora_a", "lora_b"))
            stack = wanted[f"model.layers.{layer}.mlp.experts.{'down' if role == 'down' else 'gate_up'}_proj"]
            part = {"gate": stack[:, :12], "up": stack[:, 12:], "down": stack}[role]
            for expert in range(3):
                weight = before[f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight"]
                update = B[expert] @ A[expert] * (header.metadata["adapter.lora.alpha"] / result.rank)
                torch.testing.assert_close(weight + update, part[expert], rtol=0, atol=3e-6)
    assert_same(merged(tmp_path / "out.gguf", fused, tmp_path / "again"), wanted)
    for name, weight in got.items():
        if ".experts." not in name:
            torch.testing.assert_close(weight, wanted[name], rtol=0, atol=3e-6)


def values_of(header: GgufFile, name: str) -> torch.Tensor:
    tensor = next(tensor for tensor in header.tensors if tensor.name == name)
    values = np.fromfile(header.path, np.float32, math.prod(tensor.shape), offset=tensor.start)
    return torch.from_numpy(values).view(tensor.shape)


def test_llama_cpp_has_no_names_for_all_experts(bases, tmp_path):
    base = bases.folder("gpt-oss", "default")
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"], task_type="CAUSAL_LM")
    get_peft_model(MODELS["gpt-oss"].load(base), config).save_pretrained(tmp_path / "own")
    with pytest.raises(UnsupportedError, match="GGUF has no names for the modules"):
        mapconv.export(tmp_path / "own", tmp_path / "out.gguf", to="gguf", base=base)


def test_experts_that_were_always_one_tensor(bases, tmp_path):
    base = bases.folder("gpt-oss", "default")
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"], task_type="CAUSAL_LM")
    get_peft_model(MODELS["gpt-oss"].load(base), config).save_pretrained(tmp_path / "own")
    with pytest.raises(UnsupportedError, match="no names of their own"):
        mapconv.export(tmp_path / "own", tmp_path / "out", to="peft", experts="split", base=base)
    mapconv.export(tmp_path / "own", tmp_path / "out", to="peft", base=base)
