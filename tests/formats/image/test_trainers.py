"""Adapters of video models and of newer image models, as their trainers spell them, beside the formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import AdapterError

RANK, ALPHA, WIDTH = 2, 3.0, 8
AB, DEFAULT = ("lora_A.weight", "lora_B.weight"), ("lora_A.default.weight", "lora_B.default.weight")
DOWN = ("lora_down.weight", "lora_up.weight")
WAN, QWEN, LTX = "blocks.0.self_attn.q", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn1.to_q"
UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
#: trainer -> (the base's module, the adapter's key, its endings, whether it has an alpha, rows, the dialect)
SPELLINGS = {
    "musubi, Wan": (WAN, "lora_unet_blocks_0_self_attn_q", DOWN, True, WIDTH, "kohya's sd-scripts"),
    "VideoX-Fun, Wan": (WAN, "lora_unet__blocks_0_self_attn_q", DOWN, True, WIDTH, "kohya's sd-scripts"),
    "ComfyUI, Wan": (WAN, f"diffusion_model.{WAN}", AB, False, WIDTH, "ComfyUI"),
    "lightx2v, Wan": (WAN, f"diffusion_model.{WAN}", DOWN, True, WIDTH, "ComfyUI"),
    "bare, Wan": (WAN, WAN, AB, False, WIDTH, "ComfyUI"),
    "musubi, HunyuanVideo": (
        "double_blocks.0.img_attn_qkv", "lora_unet_double_blocks_0_img_attn_qkv", DOWN, True, 3 * WIDTH,
        "kohya's sd-scripts",
    ),
    "ComfyUI, HunyuanVideo": (
        "double_blocks.0.img_attn.qkv", "diffusion_model.double_blocks.0.img_attn_qkv", AB, False, 3 * WIDTH, "ComfyUI",
    ),
    "original names, HunyuanVideo": (
        "double_blocks.0.img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv", AB, False, 3 * WIDTH, "ComfyUI",
    ),
    "DiffSynth, Qwen-Image": (QWEN, QWEN, DEFAULT, False, WIDTH, "ComfyUI"),
    "diffusers, Qwen-Image": (QWEN, f"transformer.{QWEN}", AB, False, WIDTH, "diffusers"),
    "musubi, Qwen-Image": (QWEN, "lora_unet_transformer_blocks_0_attn_to_q", DOWN, True, WIDTH, "kohya's sd-scripts"),
    "LTX": (LTX, f"diffusion_model.{LTX}", AB, False, WIDTH, "ComfyUI"),
    "old processors": (
        f"{UNET}.to_q", f"unet.{UNET}.processor.to_q_lora", ("down.weight", "up.weight"), False, WIDTH, "diffusers",
    ),
    "old processors, their output": (
        f"{UNET}.to_out.0", f"unet.{UNET}.processor.to_out_lora", ("down.weight", "up.weight"), False, WIDTH,
        "diffusers",
    ),
    "old processors, bare": (
        f"{UNET}.to_v", f"{UNET}.processor.to_v_lora", ("down.weight", "up.weight"), False, WIDTH, "diffusers",
    ),
}  # fmt: skip


def written(folder: Path, name: str) -> tuple[Path, Path, str, torch.Tensor]:
    """(the base, the adapter, the tensor that it changes, what it makes of it)."""
    module, key, endings, has_alpha, rows, _ = SPELLINGS[name]
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, WIDTH, generator=generator)
    A, B = torch.randn(RANK, WIDTH, generator=generator), torch.randn(rows, RANK, generator=generator)
    save_file({f"{module}.weight": weight, "other.weight": torch.ones(2, 2)}, folder / "base.safetensors")
    tensors = {f"{key}.{endings[0]}": A, f"{key}.{endings[1]}": B}
    if endings[0] == "down.weight":
        tensors = {f"{key}.{ending}": tensor for ending, tensor in zip(endings, (A, B), strict=True)}
    if has_alpha:
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, folder / "style.safetensors")
    scaling = ALPHA / RANK if has_alpha else 1.0
    wanted = weight.double() + scaling * B.double() @ A.double()
    return folder / "base.safetensors", folder / "style.safetensors", f"{module}.weight", wanted


@pytest.mark.parametrize("name", SPELLINGS)
def test_placed_and_merged(name, tmp_path):
    base, file, tensor, wanted = written(tmp_path, name)
    assert mapconv.inspect(file).dialect == SPELLINGS[name][-1]
    mapconv.merge(file, tmp_path / "merged.safetensors", base=base)
    merged = load_file(tmp_path / "merged.safetensors")
    torch.testing.assert_close(merged[tensor].double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(merged["other.weight"], torch.ones(2, 2))


@pytest.mark.parametrize(
    ("name", "ending"),
    [("diffusers, Qwen-Image", "lora_magnitude_vector"), ("ComfyUI, Wan", "magnitude"), ("LTX", "magnitude")],
)
def test_magnitudes_of_outputs_need_no_axis_on_a_square_weight(name, ending, tmp_path):
    base, file, tensor, wanted = written(tmp_path, name)
    magnitude = torch.linspace(1, 2, WIDTH)
    save_file(load_file(file) | {f"{SPELLINGS[name][1]}.{ending}": magnitude}, file)
    mapconv.merge(file, tmp_path / "merged.safetensors", base=base)
    wanted = wanted * (magnitude.double() / wanted.norm(dim=1))[:, None]
    torch.testing.assert_close(
        load_file(tmp_path / "merged.safetensors")[tensor].double(), wanted, rtol=1e-6, atol=1e-6
    )
    save_file(load_file(file) | {f"{SPELLINGS[name][1]}.{ending}": torch.ones(WIDTH, 2)}, file)
    with pytest.raises(AdapterError, match=rf"{ending} is \[8, 2\], expected \[8\]"):
        mapconv.inspect(file)


def test_a_weight_that_is_set(tmp_path):
    base, file, tensor, _ = written(tmp_path, "ComfyUI, Wan")
    new = torch.full((WIDTH, WIDTH), 2.0)
    save_file({f"diffusion_model.{WAN}.set_weight": new}, file)
    mapconv.merge(file, tmp_path / "merged.safetensors", base=base)
    assert torch.equal(load_file(tmp_path / "merged.safetensors")[tensor], new)


def test_the_same_dora_in_three_spellings_makes_the_same_files(tmp_path):
    """kohya's, ComfyUI's and PEFT's: what is upgraded has the same bytes in its factors."""

    base, file, _, _ = written(tmp_path, "ComfyUI, Wan")
    A, B = (load_file(file)[f"diffusion_model.{WAN}.{ending}"] for ending in AB)
    alpha, magnitude = torch.tensor(ALPHA), torch.linspace(3, 4, WIDTH)
    column = magnitude[:, None]
    spelled = {
        "kohya": {"lora_down.weight": A, "lora_up.weight": B, "alpha": alpha, "dora_scale": column},
        "comfyui": {"lora_A.weight": A, "lora_B.weight": B, "alpha": alpha, "dora_scale": column},
    }
    prefixes = {"kohya": "lora_unet_blocks_0_self_attn_q", "comfyui": f"diffusion_model.{WAN}"}
    for name, parts in spelled.items():
        (tmp_path / name).mkdir()
        save_file({f"{prefixes[name]}.{e}": t for e, t in parts.items()}, tmp_path / name / "style.safetensors")
    peft = tmp_path / "peft"
    peft.mkdir()
    key = f"base_model.model.{WAN}"
    save_file(
        {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B, f"{key}.lora_magnitude_vector": magnitude},
        peft / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": True, "target_modules": [WAN]}
    (peft / "adapter_config.json").write_text(json.dumps(config))
    # A folder of one model, which all three fit.
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(load_file(base), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    sources = {"kohya": tmp_path / "kohya/style.safetensors", "comfyui": tmp_path / "comfyui/style.safetensors"}
    for direction in ("low-rank", "dora"):
        found = {}
        for name, source in (sources | {"peft": peft}).items():
            mapconv.upgrade(source, tmp_path / f"{name}-{direction}", base=folder, direction=direction)
            found[name] = (tmp_path / f"{name}-{direction}" / "adapter_model.safetensors").read_bytes()
        assert found["kohya"] == found["comfyui"] == found["peft"]
