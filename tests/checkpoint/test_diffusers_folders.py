"""Models of diffusers as a base: their own file names, an index, and folders of a pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv

DIFFUSERS = "diffusion_pytorch_model"
PREFIX = "base_model.model."
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KERNEL = "conv_in"


@pytest.fixture
def unet(tmp_path) -> Path:
    folder = tmp_path / "pipeline" / "unet"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    shapes = {f"{LINEAR}.weight": (8, 8), f"{KERNEL}.weight": (6, 4, 3, 3), f"{KERNEL}.bias": (6,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / f"{DIFFUSERS}.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", "sample_size": 8}))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [None, None],
    }
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def adapter(tmp_path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)
    shapes = {LINEAR: ((2, 8), (8, 2)), KERNEL: ((2, 4, 3, 3), (6, 2, 1, 1))}
    save_file(
        {
            f"{PREFIX}{path}.lora_{part}.weight": torch.randn(shape, generator=generator)
            for path, pair in shapes.items()
            for part, shape in zip("AB", pair, strict=True)
        },
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q", "conv_in"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def expected(unet: Path, adapter: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(next(unet.glob("*.safetensors")))
    factors = load_file(adapter / "adapter_model.safetensors")
    for path in (LINEAR, KERNEL):
        A, B = (factors[f"{PREFIX}{path}.lora_{part}.weight"] for part in "AB")
        weight = tensors[f"{path}.weight"]
        tensors[f"{path}.weight"] = weight + (B.flatten(1) @ A.flatten(1)).view(weight.shape)
    return tensors


@pytest.mark.parametrize("stem", [DIFFUSERS, f"{DIFFUSERS}.fp16"])
def test_a_folder_keeps_its_file_name(stem, unet, adapter, tmp_path):
    wanted = expected(unet, adapter)
    (unet / f"{DIFFUSERS}.safetensors").rename(unet / f"{stem}.safetensors")
    mapconv.merge(adapter, tmp_path / "merged", base=unet)
    merged = load_file(tmp_path / "merged" / f"{stem}.safetensors")
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    mapconv.upgrade(adapter, tmp_path / "map", base=unet)
    assert mapconv.inspect(tmp_path / "map", base=unet).fits == unet


def test_shards_and_their_index(unet, adapter, tmp_path):
    wanted = expected(unet, adapter)
    mapconv.merge(adapter, tmp_path / "shards", base=unet, max_shard_size="0.3KB")
    names = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert names == [f"{DIFFUSERS}-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.loads((tmp_path / "shards" / f"{DIFFUSERS}.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == wanted.keys()
    # A sharded model is a base as well, under the same names.
    mapconv.merge(adapter, tmp_path / "again", base=tmp_path / "shards", max_shard_size=1 << 20)
    assert (tmp_path / "again" / f"{DIFFUSERS}.safetensors").is_file()


def test_half_precision_leaves_the_configuration_alone(unet, adapter, tmp_path):
    mapconv.merge(adapter, tmp_path / "merged", base=unet, dtype="float16")
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == json.loads(
        (unet / "config.json").read_text()
    )


def test_a_whole_pipeline_is_a_base_too(unet, adapter, tmp_path):
    wanted = expected(unet, adapter)
    mapconv.merge(adapter, tmp_path / "merged", base=unet.parent)
    merged = load_file(tmp_path / "merged" / "unet" / f"{DIFFUSERS}.safetensors")
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor)
    assert (tmp_path / "merged" / "model_index.json").read_bytes() == (unet.parent / "model_index.json").read_bytes()
    assert (tmp_path / "merged" / "unet" / "config.json").is_file()
    mapconv.merge(adapter, tmp_path / "merged", base=unet.parent, force=True)
    (tmp_path / "merged" / "unet" / "notes.txt").write_text("mine")
    with pytest.raises(mapconv.MapconvError, match=r"holds unet/notes\.txt"):
        mapconv.merge(adapter, tmp_path / "merged", base=unet.parent, force=True)


def test_stock_diffusers_loads_the_result(tmp_path, adapter):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    from peft import LoraConfig, get_peft_model

    from tests.matrix.oracle import attach_whole, distance, randomise

    model.save_pretrained(tmp_path / "unet")
    shutil.rmtree(adapter)
    targets = ["to_q", "to_out.0", "conv1", "conv_in"]
    trained = get_peft_model(model, LoraConfig(r=2, target_modules=targets, use_dora=True)).eval()
    randomise(trained, seed=4)
    trained.save_pretrained(adapter)
    inputs = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 2, 8)
    with torch.no_grad():
        wanted = trained(*inputs).sample
        mapconv.merge(adapter, tmp_path / "merged", base=tmp_path / "unet")
        merged = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged").eval()
        assert distance(merged(*inputs).sample, wanted) < 1e-4
        mapconv.upgrade(adapter, tmp_path / "map", base=tmp_path / "unet", direction="dora")
        plain = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
        assert distance(attach_whole(plain, tmp_path / "map")(*inputs).sample, wanted) < 1e-4
