"""An exported folder rendered by a pipeline of diffusers: the picture is the merged model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    folder = tmp_path_factory.mktemp("rendered") / "unet"
    model.save_pretrained(folder)
    return folder


def picture(unet: Path, lora: Path | None = None) -> torch.Tensor:
    """Two steps from the same noise; without a text encoder, for prompts that are embedded already."""
    torch.manual_seed(4)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=diffusers.UNet2DConditionModel.from_pretrained(unet),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randn(2, 1, 6, 8, generator=generator)
    images = pipe(
        prompt_embeds=prompt[0],
        negative_prompt_embeds=prompt[1],
        height=8,
        width=8,
        num_inference_steps=2,
        generator=generator,
        output_type="pt",
    ).images
    return images


def test_the_picture_is_that_of_the_merged_model(unet, tmp_path):
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name, weight in load_file(unet / "diffusion_pytorch_model.safetensors").items():
        path = name.removesuffix(".weight")
        if path.rpartition(".")[2] in ("to_q", "to_v", "proj_in", "conv1"):
            key, ones = f"lora_unet_{path.replace('.', '_')}", (1,) * (weight.dim() - 2)
            tensors[f"{key}.lora_down.weight"] = torch.randn(3, *weight.shape[1:], generator=generator)
            tensors[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 3, *ones, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(1.5)
    save_file(tensors, tmp_path / "style.safetensors")
    mapconv.export(tmp_path / "style.safetensors", tmp_path / "out", to="diffusers", base=unet)
    mapconv.merge(tmp_path / "style.safetensors", tmp_path / "merged", base=unet)
    wanted = picture(tmp_path / "merged")
    torch.testing.assert_close(picture(unet, tmp_path / "out"), wanted, rtol=0, atol=2e-5)
    assert (picture(unet) - wanted).abs().max() > 1e-3
