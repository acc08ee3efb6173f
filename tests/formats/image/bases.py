"""Small bases in every form that a model of images comes in, and what each calls the same modules.

A module is known here by diffusers' name, behind that of its component.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_QUERY, _UP = "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.0.proj"
#: (diffusers' name, ldm's, shape) of a U-Net of two levels with one layer each, the lower one with attention.
UNET = [
    ("conv_in", "input_blocks.0.0", (6, 4, 3, 3)),
    ("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2", (8, 6, 3, 3)),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op", (8, 8, 3, 3)),
    ("down_blocks.1.resnets.0.conv1", "input_blocks.3.0.in_layers.2", (8, 8, 3, 3)),
    ("down_blocks.1.attentions.0.proj_in", "input_blocks.3.1.proj_in", (8, 10)),
    (f"down_blocks.1.attentions.0.{_QUERY}", f"input_blocks.3.1.{_QUERY}", (12, 8)),
    ("mid_block.resnets.1.conv_shortcut", "middle_block.2.skip_connection", (8, 6, 1, 1)),
    (f"mid_block.attentions.0.{_UP}", f"middle_block.1.{_UP}", (16, 8)),
    ("up_blocks.0.resnets.1.conv2", "output_blocks.1.0.out_layers.3", (8, 8, 3, 3)),
    ("up_blocks.0.attentions.1.proj_in", "output_blocks.1.1.proj_in", (8, 10)),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.2.conv", (8, 8, 3, 3)),
    ("up_blocks.1.resnets.0.conv1", "output_blocks.2.0.in_layers.2", (8, 8, 3, 3)),
    ("time_embedding.linear_1", "time_embed.0", (8, 6)),
]
TEXT = {
    "encoder.layers.0.self_attn.q_proj": (8, 8),
    "encoder.layers.0.self_attn.k_proj": (8, 8),
    "encoder.layers.0.self_attn.v_proj": (8, 8),
    "encoder.layers.0.mlp.fc1": (12, 8),
}
_OPEN_CLIP = "conditioner.embedders.1.model.transformer.resblocks.0"
H = 8
#: Flux: (diffusers' names, the authors' module that holds their rows, width).
FLUX = [
    (tuple(f"transformer_blocks.0.attn.to_{part}" for part in "qkv"), "double_blocks.0.img_attn.qkv", H),
    (tuple(f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"), "double_blocks.0.txt_attn.qkv", H),
    (("transformer_blocks.0.attn.to_out.0",), "double_blocks.0.img_attn.proj", H),
    (("transformer_blocks.0.ff.net.0.proj",), "double_blocks.0.img_mlp.0", H),
    (("x_embedder",), "img_in", 6),
]


@dataclass(frozen=True)
class Base:
    """A base on disk, and where it keeps the rows of each module."""

    path: Path
    read: Callable[[Path], dict[str, torch.Tensor]]
    #: module -> (tensor's name, first row, rows)
    places: dict[str, tuple[str, int, int]]

    def weights(self, path: Path) -> dict[str, torch.Tensor]:
        """Every module's weight, of this base or of a model that was merged from it."""
        tensors = self.read(path)
        return {name: tensors[key][start : start + rows] for name, (key, start, rows) in self.places.items()}


def _weight(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _modules(generator: torch.Generator) -> dict[str, torch.Tensor]:
    weights = {f"unet.{name}": _weight(generator, shape) for name, _, shape in UNET}
    for encoder in ("text_encoder", "text_encoder_2"):
        weights |= {f"{encoder}.{name}": _weight(generator, shape) for name, shape in TEXT.items()}
    return weights


def _folder(tensors: dict[str, torch.Tensor], folder: Path, config: dict, file: str) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


DIFFUSERS, MODEL = "diffusion_pytorch_model.safetensors", "model.safetensors"


def unet_folder(root: Path) -> Base:
    weights = _modules(torch.Generator().manual_seed(1))
    own = {name.removeprefix("unet."): tensor for name, tensor in weights.items() if name.startswith("unet.")}
    tensors = {f"{name}.weight": tensor for name, tensor in own.items()}
    path = _folder(tensors, root / "unet", {"_class_name": "UNet2DConditionModel"}, DIFFUSERS)
    places = {f"unet.{name}": (f"{name}.weight", 0, len(tensor)) for name, tensor in own.items()}
    return Base(path, lambda folder: load_file(folder / DIFFUSERS), places)


def pipeline(root: Path) -> Base:
    weights = _modules(torch.Generator().manual_seed(1))
    folder, places = root / "pipeline", {}
    index: dict[str, list[str | None]] = {"vae": [None, None]}
    for part, file, config in (
        ("unet", DIFFUSERS, {"_class_name": "UNet2DConditionModel"}),
        ("text_encoder", MODEL, {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}),
        ("text_encoder_2", MODEL, {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"}),
    ):
        prefix = "text_model." if part == "text_encoder_2" else ""
        own = {name.removeprefix(f"{part}."): t for name, t in weights.items() if name.startswith(f"{part}.")}
        _folder({f"{prefix}{name}.weight": tensor for name, tensor in own.items()}, folder / part, config, file)
        places |= {f"{part}.{name}": (f"{part}.{prefix}{name}.weight", 0, len(t)) for name, t in own.items()}
        index[part] = ["diffusers", part]
    (folder / "model_index.json").write_text(json.dumps(index))

    def read(folder: Path) -> dict[str, torch.Tensor]:
        files = {"unet": DIFFUSERS, "text_encoder": MODEL, "text_encoder_2": MODEL}
        return {f"{part}.{k}": t for part, file in files.items() for k, t in load_file(folder / part / file).items()}

    return Base(folder, read, places)


def single_file(root: Path) -> Base:
    weights = _modules(torch.Generator().manual_seed(1))
    tensors, places = {}, {}
    for name, ldm, _ in UNET:
        key = f"model.diffusion_model.{ldm}.weight"
        tensors[key], places[f"unet.{name}"] = weights[f"unet.{name}"], (key, 0, len(weights[f"unet.{name}"]))
    for name in TEXT:
        key = f"conditioner.embedders.0.transformer.text_model.{name}.weight"
        tensors[key] = weights[f"text_encoder.{name}"]
        places[f"text_encoder.{name}"] = (key, 0, len(tensors[key]))
    qkv = [f"text_encoder_2.encoder.layers.0.self_attn.{part}_proj" for part in "qkv"]
    tensors[f"{_OPEN_CLIP}.attn.in_proj_weight"] = torch.cat([weights[name] for name in qkv])
    places |= {name: (f"{_OPEN_CLIP}.attn.in_proj_weight", 8 * place, 8) for place, name in enumerate(qkv)}
    tensors[f"{_OPEN_CLIP}.mlp.c_fc.weight"] = weights["text_encoder_2.encoder.layers.0.mlp.fc1"]
    places["text_encoder_2.encoder.layers.0.mlp.fc1"] = (f"{_OPEN_CLIP}.mlp.c_fc.weight", 0, 12)
    tensors["first_stage_model.decoder.conv_in.weight"] = torch.ones(2, 2)
    root.mkdir(parents=True, exist_ok=True)
    save_file(tensors, root / "xl.safetensors", metadata={"modelspec.title": "small"})
    return Base(root / "xl.safetensors", load_file, places)


def _flux(generator: torch.Generator) -> dict[str, torch.Tensor]:
    weights = {}
    for names, _, width in FLUX:
        for name in names:
            weights[f"unet.{name}"] = _weight(generator, (4 * H if "ff" in name else H, width))
    return weights


def flux_folder(root: Path) -> Base:
    own = {name.removeprefix("unet."): t for name, t in _flux(torch.Generator().manual_seed(2)).items()}
    tensors = {f"{name}.weight": tensor for name, tensor in own.items()}
    path = _folder(tensors, root / "transformer", {"_class_name": "FluxTransformer2DModel"}, DIFFUSERS)
    places = {f"unet.{name}": (f"{name}.weight", 0, len(tensor)) for name, tensor in own.items()}
    return Base(path, lambda folder: load_file(folder / DIFFUSERS), places)


def flux_file(root: Path) -> Base:
    weights = _flux(torch.Generator().manual_seed(2))
    tensors, places = {}, {}
    for names, key, _ in FLUX:
        start = 0
        for name in names:
            rows = len(weights[f"unet.{name}"])
            places[f"unet.{name}"] = (f"{key}.weight", start, rows)
            start += rows
        tensors[f"{key}.weight"] = torch.cat([weights[f"unet.{name}"] for name in names])
    root.mkdir(parents=True, exist_ok=True)
    save_file(tensors, root / "flux.safetensors")
    return Base(root / "flux.safetensors", load_file, places)


BASES: dict[str, Callable[[Path], Base]] = {
    "folder": unet_folder,
    "pipeline": pipeline,
    "file": single_file,
    "flux-folder": flux_folder,
    "flux-file": flux_file,
}
