"""Files of kohya's sd-scripts on a folder of diffusers, beside diffusers' own loading and fusing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.placement.spelling.unet import other_names

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kohya") / "unet"
    torch.manual_seed(3)
    diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(unet) -> dict[str, torch.Tensor]:
    """A LoRA on every linear layer and convolution of the blocks, with alpha 1.5 at rank 3."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, weight in load_file(unet / "diffusion_pytorch_model.safetensors").items():
        if not name.endswith(".weight") or weight.dim() < 2 or ("blocks" not in name and "mid_block" not in name):
            continue
        key, ones = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}", (1,) * (weight.dim() - 2)
        tensors[f"{key}.lora_down.weight"] = torch.randn(3, *weight.shape[1:], generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 3, *ones, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(1.5)
    return tensors


@pytest.fixture
def source(lora, tmp_path) -> Path:
    save_file(lora, tmp_path / "style.safetensors", metadata={"ss_network_module": "networks.lora"})
    return tmp_path / "style.safetensors"


def fused(unet: Path, lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model = diffusers.UNet2DConditionModel.from_pretrained(unet)
    state, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(dict(lora))
    diffusers.StableDiffusionPipeline.load_lora_into_unet(state, alphas, model)
    model.fuse_lora()
    model.unload_lora()
    return model.state_dict()


def test_merged_and_upgraded_as_diffusers_fuses_it(unet, lora, source, tmp_path):
    wanted = fused(unet, lora)
    mapconv.merge(source, tmp_path / "merged", base=unet)
    result = mapconv.upgrade(source, base=unet)
    assert result.out == tmp_path / "style-map"
    assert result.worst_error == 0
    mapconv.merge(result.out, tmp_path / "again", base=unet)
    for folder in ("merged", "again"):
        merged = load_file(tmp_path / folder / "diffusion_pytorch_model.safetensors")
        assert merged.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6)
    record = json.loads((result.out / "map_config.json").read_text())
    assert record["source"]["method"] == "LoRA"
    assert record["source"]["fingerprint"].startswith("sha256:")


def test_inspect_says_the_dialect(unet, source):
    found = mapconv.inspect(source)
    assert (found.dialect, found.components) == ("kohya's sd-scripts", ("denoiser",))
    assert {group.scalings for group in found.targets} == {(0.5,)}
    assert mapconv.inspect(source, base=unet).targets[0].module_type == "proj_in"


def test_without_alphas_the_scaling_is_one(lora, tmp_path):
    save_file({key: tensor for key, tensor in lora.items() if "alpha" not in key}, tmp_path / "style.safetensors")
    assert {group.scalings for group in mapconv.inspect(tmp_path / "style.safetensors").targets} == {(1.0,)}


def test_a_model_that_the_base_has_not_got(unet, lora, tmp_path):
    key = "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_{}.weight"
    more = {key.format("down"): torch.ones(2, 8), key.format("up"): torch.ones(8, 2)}
    save_file(lora | more, tmp_path / "style.safetensors")
    with pytest.raises(PlacementError, match=r"adapts text_encoder_2 .*the base has only denoiser"):
        mapconv.merge(tmp_path / "style.safetensors", tmp_path / "merged", base=unet)


def test_keys_that_are_nobody_s_name_the_trainer(lora, tmp_path):
    save_file(
        lora | {"lora_unet_conv_in.oft_blocks": torch.ones(2)},
        tmp_path / "style.safetensors",
        metadata={"ss_network_module": "networks.oft"},
    )
    with pytest.raises(UnsupportedError, match=r"--network_module .networks\.oft.*lora_unet_conv_in\.oft_blocks"):
        mapconv.inspect(tmp_path / "style.safetensors")


def test_sgm_names_are_those_that_diffusers_maps():
    """Every linear layer of a U-Net with SDXL's plan, in the names of its authors and back by diffusers' own table."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(
            layers_per_block=2,
            block_out_channels=(8, 16, 16),
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=(2, 4, 4),
            transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )
    paths = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    sgm = {path: name for path, name in other_names(paths | all_convolutions(model)) if path in paths}
    assert sgm.keys() == paths
    attended = {path for path in paths if ".attentions." in path}
    # One number in each marks the module that it went out from.
    marks = dict(enumerate(sorted(attended), 1))
    tensors = {}
    for mark, path in marks.items():
        key = f"lora_unet_{sgm[path].replace('.', '_')}"
        tensors |= {f"{key}.lora_{part}.weight": torch.full((1, 1), float(mark)) for part in ("down", "up")}
    mapped = _maybe_map_sgm_blocks_to_diffusers(tensors, model.config)
    state, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    found = {name: int(tensor.item()) for name, tensor in state.items() if name.endswith("lora.down.weight")}
    assert len(found) == len(attended)
    for name, mark in found.items():
        assert spelled_new(name.removeprefix("unet.")) == marks[mark]


def all_convolutions(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}


def spelled_new(name: str) -> str:
    """The module of a tensor of diffusers' old attention processors, whose ``to_out`` has no number."""
    path = name.removesuffix(".down.weight").removesuffix("_lora").removesuffix(".lora").replace(".processor", "")
    return f"{path}.0" if path.endswith(".to_out") else path
