"""LoMAP of image models in diffusers' files, held to the authors' formula in float64, and refused where broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.errors import MapconvError
from tests.formats.test_lomap import formula

FILE = "diffusion_pytorch_model.safetensors"
SHAPES = {"mid_block.attentions.0.proj_in": (12, 8), "down_blocks.0.resnets.0.conv1": (6, 8, 3, 3)}
KEY = "unet.mid_block.attentions.0.proj_in"
ALPHA, BETA = 3.0, -0.7


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("authors") / "unet"
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save_file(tensors, folder / FILE)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    return folder


def lomap(down: str = "lora_A.weight", up: str = "lora_B.weight", scalar: str = "lora_map_") -> dict[str, torch.Tensor]:
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, shape in SHAPES.items():
        tensors[f"unet.{name}.{down}"] = torch.randn(2, *shape[1:], generator=generator)
        tensors[f"unet.{name}.{up}"] = torch.randn(shape[0], 2, *(1 for _ in shape[2:]), generator=generator)
        tensors[f"unet.{name}.{scalar}alpha"] = torch.tensor(ALPHA)
        tensors[f"unet.{name}.{scalar}beta"] = torch.tensor(BETA)
    return tensors


def header(**fields: object) -> dict[str, str]:
    table = {"r": 2, "lora_alpha": 4, "target_modules": ["proj_in", "conv1"]} | fields
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in table.items()})}


@pytest.mark.parametrize(
    ("spelling", "metadata", "s", "eps"),
    [
        ({}, None, 1.0, 1e-6),
        ({"down": "lora.down.weight", "up": "lora.up.weight", "scalar": "map_"}, None, 1.0, 1e-6),
        ({}, header(lora_use_map=True, lora_map_eps=1e3), 2.0, 1e3),
    ],
    ids=["bare", "old-names", "header"],
)
def test_merge_and_upgrade_are_the_formula(spelling, metadata, s, eps, unet, tmp_path):
    tensors, base = lomap(**spelling), load_file(unet / FILE)
    save_file(tensors, tmp_path / "style.safetensors", metadata=metadata)
    assert mapconv.inspect(tmp_path / "style.safetensors").method == "LoMAP"
    mapconv.merge(tmp_path / "style.safetensors", tmp_path / "merged", base=unet)
    mapconv.upgrade(tmp_path / "style.safetensors", tmp_path / "map", base=unet)
    mapconv.merge(tmp_path / "map", tmp_path / "again", base=unet)
    for name, shape in SHAPES.items():
        A, B = (value for key, value in tensors.items() if name in key and value.dim() > 1)
        scalars = (torch.tensor(value).double() for value in (ALPHA, BETA))
        wanted = formula(base[f"{name}.weight"].flatten(1), A.flatten(1), B.flatten(1), s, *scalars, eps).view(shape)
        for folder in ("merged", "again"):
            found = load_file(tmp_path / folder / FILE)[f"{name}.weight"].double()
            assert float((found - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize(
    ("changes", "fields", "reason"),
    [
        ({f"{KEY}.lora_map_beta": None}, None, "has no map_beta"),
        ({f"{KEY}.lora_map_{which}": None for which in ("alpha", "beta")}, None, "has no map_alpha"),
        ({f"{KEY}.lora_map_alpha": torch.ones(12)}, None, r"is \[12\], expected one number"),
        ({f"{KEY}.lora_map_alpha": torch.tensor(float("inf"))}, None, "is inf, expected a number"),
        ({"unet.conv_out.lora_map_alpha": torch.tensor(1.0)}, None, "make no update"),
        ({f"{KEY}.map_alpha": torch.tensor(1.0)}, None, "none of those"),
        ({f"{KEY}.lora_magnitude_vector": torch.ones(12)}, None, "together with magnitudes"),
        ({f"{KEY}.lora_B.bias": torch.ones(12)}, None, "together with biases"),
        ({}, {"lora_use_map": True, "lora_map_norm_scope": "row"}, "only global is MAP"),
        ({}, {"lora_use_map": True, "lora_map_eps": "small"}, "expected a number from 0 up"),
    ],
)
def test_broken_files(changes, fields, reason, tmp_path):
    tensors = {key: value for key, value in (lomap() | changes).items() if value is not None}
    save_file(tensors, tmp_path / "style.safetensors", metadata=header(**fields) if fields else None)
    with pytest.raises(MapconvError, match=reason) as caught:
        mapconv.inspect(tmp_path / "style.safetensors")
    assert "\n" not in str(caught.value)


def test_a_header_that_says_map_without_scalars(tmp_path):
    tensors = {key: value for key, value in lomap().items() if "map_" not in key}
    save_file(tensors, tmp_path / "style.safetensors", metadata=header(lora_use_map=True))
    with pytest.raises(MapconvError, match="has no map_alpha, but the adapter is one of MAP's authors"):
        mapconv.inspect(tmp_path / "style.safetensors")
