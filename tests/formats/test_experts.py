"""Stacks of experts in the files of Tinker, SGLang and MLX-LM, beside the weights that their formulas make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import AdapterError
from tests.matrix.bases import Bases
from tests.matrix.models import MODELS

EXPERTS, HIDDEN, INNER, RANK, SCALE = 3, 16, 12, 2, 1.5
SHAPES = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
LAYER = "model.layers.0.mlp"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def stacks(*, shared: bool = False) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of each projection of a layer: (E, r, in) and (E, out, r), or one A for all experts."""
    generator = torch.Generator().manual_seed(3)
    return {
        role: (
            torch.randn(1 if shared and role != "down" else EXPERTS, RANK, width, generator=generator),
            torch.randn(1 if shared and role == "down" else EXPERTS, height, RANK, generator=generator),
        )
        for role, (height, width) in SHAPES.items()
    }


def peft_folder(folder: Path, tensors: Tensors) -> None:
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK * SCALE, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def tinker(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    own, tensors = stacks(shared=True), {}
    for leaf, role in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        tensors |= {f"{LAYER}.experts.{leaf}.lora_{part}.weight": own[role]["AB".index(part)] for part in "AB"}
    peft_folder(folder, tensors)
    return own


def sglang(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    own = stacks()
    both = [torch.cat([own["gate"][place], own["up"][place]], dim=1) for place in (0, 1)]
    tensors = {f"{LAYER}.experts.gate_up_proj.lora_{part}.weight": both["AB".index(part)] for part in "AB"}
    tensors |= {f"{LAYER}.experts.down_proj.lora_{part}.weight": own["down"]["AB".index(part)] for part in "AB"}
    peft_folder(folder, tensors)
    return own


def mlx(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    own, tensors = stacks(), {}
    for role, pair in own.items():
        tensors |= {f"{LAYER}.switch_mlp.{role}_proj.lora_{part}": pair["ab".index(part)] for part in "ab"}
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": RANK, "scale": SCALE}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return own


def merged_weights(folder: Path) -> Tensors:
    """Those of the experts of layer 0, one by one, whichever version of transformers wrote the model."""
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        path = name.removesuffix(".weight")
        if not path.startswith(f"{LAYER}.experts."):
            continue
        if tensor.dim() == 3:
            for number, weight in enumerate(tensor):
                roles = ("gate", "up") if path.endswith("gate_up_proj") else ("down",)
                found |= {
                    f"{number}.{role}_proj": part for role, part in zip(roles, weight.chunk(len(roles)), strict=True)
                }
        else:
            found[path.removeprefix(f"{LAYER}.experts.")] = tensor
    return found


@pytest.mark.parametrize("spelling", ["default", "fused"])
@pytest.mark.parametrize("written", [tinker, sglang, mlx])
def test_merged_and_upgraded(written: Callable, spelling, bases, tmp_path):
    base = bases.folder("qwen3-moe", spelling)
    own = written(tmp_path / "own")
    mapconv.merge(tmp_path / "own", tmp_path / "merged", base=base)
    mapconv.upgrade(tmp_path / "own", tmp_path / "map", base=base)
    mapconv.merge(tmp_path / "map", tmp_path / "again", base=base)
    before = merged_weights(base)
    assert len(before) == 3 * EXPERTS
    for folder in ("merged", "again"):
        for name, weight in merged_weights(tmp_path / folder).items():
            number, _, leaf = name.partition(".")
            A, B = (tensor[min(int(number), len(tensor) - 1)].double() for tensor in own[leaf.removesuffix("_proj")])
            torch.testing.assert_close(weight.double(), before[name].double() + SCALE * B @ A, rtol=1e-5, atol=1e-5)


def test_mlx_lm_s_own_layer_fuses_to_the_same(bases, tmp_path):
    mx, lora = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.tuner.lora")
    switch = pytest.importorskip("mlx_lm.models.switch_layers")
    base = bases.folder("qwen3-moe", "default")
    own, before = mlx(tmp_path / "own"), merged_weights(base)
    mapconv.merge(tmp_path / "own", tmp_path / "merged", base=base)
    after = merged_weights(tmp_path / "merged")
    for role, (height, width) in SHAPES.items():
        linear = switch.SwitchLinear(width, height, EXPERTS, bias=False)
        linear.weight = mx.array(torch.stack([before[f"{n}.{role}_proj"] for n in range(EXPERTS)]).numpy())
        layer = lora.LoRASwitchLinear.from_base(linear, r=RANK, scale=SCALE)
        layer.lora_a, layer.lora_b = (mx.array(tensor.numpy()) for tensor in own[role])
        fused = torch.tensor(layer.fuse().weight.tolist())
        for number in range(EXPERTS):
            torch.testing.assert_close(after[f"{number}.{role}_proj"], fused[number], rtol=1e-5, atol=1e-5)


def test_mixtral_s_names_have_numbers(bases, tmp_path):
    base = bases.folder("mixtral", "default")
    shapes = {"w1": (24, HIDDEN), "w2": (HIDDEN, 24), "w3": (24, HIDDEN)}
    parent = "model.layers.1.block_sparse_moe.experts"
    generator = torch.Generator().manual_seed(2)
    own = {
        leaf: (torch.randn(3, RANK, width, generator=generator), torch.randn(3, height, RANK, generator=generator))
        for leaf, (height, width) in shapes.items()
    }
    peft_folder(
        tmp_path / "own",
        {f"{parent}.{leaf}.lora_{part}.weight": own[leaf]["AB".index(part)] for leaf in own for part in "AB"},
    )
    mapconv.merge(tmp_path / "own", tmp_path / "merged", base=base)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    for number in range(3):
        for leaf, (A, B) in own.items():
            name = f"{parent}.{number}.{leaf}.weight"
            torch.testing.assert_close(after[name], before[name] + SCALE * B[number] @ A[number], rtol=1e-5, atol=1e-5)


def test_gpt_oss_has_gate_and_up_in_turn(bases, tmp_path):
    base = bases.folder("gpt-oss", "default")
    before = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    parent, tensors, wanted = "model.layers.1", {}, dict(before)

    def factors(experts: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Tinker's experts share what meets the hidden states.
        shared = (experts, 1) if height == HIDDEN else (1, experts)
        A = torch.randn(shared[0], RANK, width, generator=generator)
        return A, torch.randn(shared[1], height, RANK, generator=generator)

    gate, up = slice(0, None, 2), slice(1, None, 2)
    for leaf, name, rows in (
        ("w1", "gate_up_proj", gate),
        ("w3", "gate_up_proj", up),
        ("w2", "down_proj", slice(None)),
    ):
        stack = wanted[f"{parent}.mlp.experts.{name}"].clone()  # (experts, in, out)
        part = stack[:, :, rows]
        A, B = factors(len(stack), part.shape[2], part.shape[1])
        part += SCALE * (B.double() @ A.double()).transpose(1, 2)
        wanted[f"{parent}.mlp.experts.{name}"] = stack
        tensors |= {f"{parent}.mlp.experts.{leaf}.lora_A.weight": A, f"{parent}.mlp.experts.{leaf}.lora_B.weight": B}
    weight = f"{parent}.self_attn.q_proj.weight"
    A, B = torch.randn(RANK, before[weight].shape[1]), torch.randn(before[weight].shape[0], RANK)
    tensors |= {f"{parent}.attn.q_proj.lora_A.weight": A, f"{parent}.attn.q_proj.lora_B.weight": B}
    wanted[weight] = before[weight] + SCALE * B @ A
    peft_folder(tmp_path / "own", tensors)
    mapconv.merge(tmp_path / "own", tmp_path / "merged", base=base)
    mapconv.upgrade(tmp_path / "own", tmp_path / "map", base=base)
    mapconv.merge(tmp_path / "map", tmp_path / "again", base=base)
    for folder in ("merged", "again"):
        after = load_file(tmp_path / folder / "model.safetensors")
        assert after.keys() == wanted.keys()
        for name, weight in wanted.items():
            torch.testing.assert_close(after[name], weight, rtol=1e-5, atol=1e-5, msg=name)
    by_peft = PeftModel.from_pretrained(MODELS["gpt-oss"].load(base), str(tmp_path / "map")).merge_and_unload()
    for name, weight in by_peft.state_dict().items():
        torch.testing.assert_close(wanted[name], weight, rtol=1e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1.lora_A": torch.ones(2, RANK, HIDDEN)}, "make no stack of experts' factors"),
        ({"w1.lora_A": torch.ones(3, 0, HIDDEN)}, "make no stack of experts' factors"),
        ({"w1.lora_A": torch.ones(RANK, HIDDEN)}, "they make no weight together"),
        ({"0.gate_proj.lora_A": torch.ones(RANK, HIDDEN)}, r"are both of module .*experts\.0\.gate_proj"),
    ],
)
def test_stacks_that_make_no_weights(change, message, tmp_path):
    tinker(tmp_path / "own")
    file = tmp_path / "own" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"base_model.model.{LAYER}.experts.{key}.weight": t for key, t in change.items()}, file)
    with pytest.raises(AdapterError, match=message):
        mapconv.inspect(tmp_path / "own")


def test_a_projection_that_the_model_has_not_got_is_empty(bases, tmp_path):
    tinker(tmp_path / "own")
    file = tmp_path / "own" / "adapter_model.safetensors"
    empty = {f"base_model.model.{LAYER}.experts.w3.lora_{part}.weight": torch.empty(0, 2, 2) for part in "AB"}
    save_file(load_file(file) | empty, file)
    mapconv.merge(tmp_path / "own", tmp_path / "merged", base=bases.folder("qwen3-moe", "default"))
    before, after = (merged_weights(f) for f in (bases.folder("qwen3-moe", "default"), tmp_path / "merged"))
    assert all(torch.equal(before[name], after[name]) == name.endswith("up_proj") for name in before)


def test_mlx_lm_s_whole_layers_take_the_place_of_the_base_s(base, tmp_path, run):
    weights = load_file(base / "model.safetensors")
    (tmp_path / "own").mkdir()
    trained = {name: tensor + 1 for name, tensor in weights.items() if ".layers.1." in name}
    save_file(trained, tmp_path / "own" / "adapters.safetensors")
    config = {"fine_tune_type": "full", "num_layers": 1, "lora_parameters": {"rank": 8, "scale": 20.0}}
    (tmp_path / "own" / "adapter_config.json").write_text(json.dumps(config))
    result = run("merge", tmp_path / "own", "--base", base, "-o", tmp_path / "merged")
    assert (result.status, "full layers" in result.out) == (0, True), result.err
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], trained.get(name, tensor)) for name, tensor in weights.items())
    exported = run("export", tmp_path / "own", "--base", base, "--to", "peft", "-o", tmp_path / "out")
    assert (exported.status, "replaces whole tensors alone" in exported.err) == (1, True)
