"""Every dialect on every form of base with every kind of update: the same weights, by formulas in float64.

A dialect here is what it calls a module and its parts. Shapes are those of ``bases``; one update is made for each
module that the file names, and of a module that the authors keep fused, one for all of its rows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mapconv

from .bases import BASES, FLUX, UNET, Base
from .updates import KINDS, low_rank

LDM = {name: ldm for name, ldm, _ in UNET}
FLAT_MODELS = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}


@dataclass(frozen=True)
class Spelled:
    """How a dialect spells a module; None for what it has no name for. ``endings`` rename the parts of a low rank."""

    key: Callable[[str], str | None]
    endings: tuple[str, str] = ("lora_down.weight", "lora_up.weight")
    has_alpha: bool = True
    magnitude: str = "dora_scale"


def flat(prefix: str | None = None, names: dict[str, str] | None = None) -> Callable[[str], str | None]:
    def key(module: str) -> str | None:
        model, _, name = module.partition(".")
        if prefix is not None and model != "unet":
            return None
        return f"{prefix or FLAT_MODELS[model]}{(names or {}).get(name, name).replace('.', '_')}"

    return key


def dotted(prefix: str, names: dict[str, str] | None = None, text: bool = False) -> Callable[[str], str | None]:
    def key(module: str) -> str | None:
        model, _, name = module.partition(".")
        if model != "unet":
            return f"{model}.text_model.{name}" if text else None
        return f"{prefix}{(names or {}).get(name, name)}"

    return key


COMFY_ENDINGS = [
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A", "lora_B"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
]
ALL = tuple(KINDS)
#: name -> (spelling, kinds of update that it can hold)
DIALECTS: dict[str, tuple[Spelled, tuple[str, ...]]] = {
    "kohya": (Spelled(flat()), ALL),
    "kohya-sgm": (Spelled(flat(names=LDM)), ("low-rank", "tucker", "loha", "lokr-w2")),
    "lycoris": (Spelled(flat("lycoris_")), ALL),
    "comfyui": (Spelled(dotted("diffusion_model.", LDM)), ALL),
    "diffusers": (Spelled(dotted("unet.", text=True), COMFY_ENDINGS[0], False, "lora_magnitude_vector"), ("low-rank",)),
} | {
    f"comfyui-{number}": (Spelled(dotted("diffusion_model.", LDM), endings), ("low-rank",))
    for number, endings in enumerate(COMFY_ENDINGS)
}
COMBINATIONS = [
    (base, dialect, kind, dora)
    for base, dialect in itertools.product(("folder", "pipeline", "file"), DIALECTS)
    for kind, dora in itertools.product(DIALECTS[dialect][1], (False, True))
    if not (dora and kind not in ("low-rank", "loha"))
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Base]:
    root = tmp_path_factory.mktemp("bases")
    return {name: make(root / name) for name, make in BASES.items()}


def write(spelled: Spelled, kind: str, base: Base, file: Path, *, dora: bool) -> dict[str, torch.Tensor]:
    """The adapter's file, and the weights that it makes of the base's modules."""
    generator = torch.Generator().manual_seed(4)
    tensors, wanted = {}, {}
    for module, weight in base.weights(base.path).items():
        key = spelled.key(module)
        if key is None:
            continue
        parts, delta = KINDS[kind](weight.shape, generator)
        if kind == "low-rank":
            parts, delta = low_rank(weight.shape, generator, *spelled.endings)
        merged = weight.double() + delta
        if not spelled.has_alpha:
            alpha = float(parts.pop("alpha"))
            merged = weight.double() + delta / (alpha / len(parts[spelled.endings[0]]))
        if dora:
            norms = merged.flatten(1).norm(dim=1)
            shape = (-1, *(1 for _ in weight.shape[1:]))
            parts[spelled.magnitude] = magnitude = (norms * 1.1).float().view(shape)
            merged *= (magnitude.flatten().double() / norms).view(shape)
        tensors |= {f"{key}.{ending}": tensor for ending, tensor in parts.items()}
        wanted[module] = merged
    save_file(tensors, file)
    return wanted


def check(base: Base, merged: Path, wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    before, after = base.weights(base.path), base.weights(merged)
    assert wanted
    for name, weight in after.items():
        tensor = wanted.get(name, before[name].double())
        assert ((weight.double() - tensor).norm() / tensor.norm()).item() < tolerance, name


@pytest.mark.parametrize(("base", "dialect", "kind", "dora"), COMBINATIONS)
def test_merged_as_the_formulas_say(base, dialect, kind, dora, bases, tmp_path):
    spelled, _ = DIALECTS[dialect]
    target, file = bases[base], tmp_path / "style.safetensors"
    if base == "folder" and dialect in ("kohya", "kohya-sgm", "diffusers"):
        spelled = Spelled(lambda module: spelled_in_unet(DIALECTS[dialect][0], module), *_rest(spelled))
    wanted = write(spelled, kind, target, file, dora=dora)
    out = tmp_path / ("merged.safetensors" if target.path.is_file() else "merged")
    mapconv.merge(file, out, base=target.path)
    check(target, out, wanted)


def spelled_in_unet(spelled: Spelled, module: str) -> str | None:
    return spelled.key(module) if module.startswith("unet.") else None


def _rest(spelled: Spelled) -> tuple:
    return spelled.endings, spelled.has_alpha, spelled.magnitude


FLUX_OF = {name: (key, part) for names, key, _ in FLUX for part, name in enumerate(names)}
XLABS = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2", "img_attn.proj": "proj_lora1"}


def authors_key(style: str, key: str) -> str | None:
    if style == "kohya":
        return f"lora_unet_{key.replace('.', '_')}"
    if style == "xlabs":
        block, _, layer = key.partition(".0.")
        return f"{block}.0.processor.{XLABS[layer]}" if layer in XLABS else None
    return f"{style}{key}"


STYLES = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "xlabs": ("down.weight", "up.weight"),
    "diffusion_model.": ("lora_A.weight", "lora_B.weight"),
    "": ("lora_A.weight", "lora_B.weight"),
}


FUSED = [
    (style, kind)
    for style, kind in itertools.product(STYLES, ("low-rank", "loha", "lokr-w2", "full", "dora"))
    if kind == "low-rank" or style != "xlabs"
]


@pytest.mark.parametrize(("style", "kind"), FUSED)
@pytest.mark.parametrize("base", ["flux-folder", "flux-file"])
def test_a_fused_module_on_either_naming(base, style, kind, bases, tmp_path):
    target, generator = bases[base], torch.Generator().manual_seed(6)
    weights, tensors, wanted = target.weights(target.path), {}, {}
    for names, key, _ in FLUX:
        spelled = authors_key(style, key)
        if spelled is None:
            continue
        fused = torch.cat([weights[f"unet.{name}"] for name in names])
        if kind in ("low-rank", "dora"):
            parts, delta = low_rank(fused.shape, generator, *STYLES[style])
        else:
            parts, delta = KINDS[kind](fused.shape, generator)
        if style == "xlabs":
            delta = delta / (float(parts.pop("alpha")) / 2)
        merged = fused.double() + delta
        if kind == "dora":
            norms = merged.norm(dim=1, keepdim=True)
            parts["dora_scale"] = (norms * 0.9).float()
            merged = merged * (parts["dora_scale"].double() / norms)
        tensors |= {f"{spelled}.{ending}": tensor for ending, tensor in parts.items()}
        sizes = [len(weights[f"unet.{name}"]) for name in names]
        wanted |= {f"unet.{name}": part for name, part in zip(names, merged.split(sizes), strict=True)}
    save_file(tensors, tmp_path / "style.safetensors")
    suffix = ".safetensors" if target.path.is_file() else ""
    mapconv.merge(tmp_path / "style.safetensors", tmp_path / f"merged{suffix}", base=target.path)
    check(target, tmp_path / f"merged{suffix}", wanted)
    mapconv.upgrade(tmp_path / "style.safetensors", tmp_path / "map", base=target.path, rank=8)
    # The result fits the model in its other form as well.
    for other in ("flux-folder", "flux-file"):
        place = tmp_path / f"{other}{'.safetensors' if other == 'flux-file' else ''}"
        if not (other != base and kind == "dora"):
            mapconv.merge(tmp_path / "map", place, base=bases[other].path, force=True)
            check(bases[other], place, wanted, 3e-6)


@pytest.mark.parametrize("base", ["folder", "pipeline"])
def test_diffusers_metadata_has_the_scaling(base, bases, tmp_path):
    target, generator = bases[base], torch.Generator().manual_seed(6)
    tensors, wanted = {}, {}
    for module, weight in target.weights(target.path).items():
        if not module.startswith("unet."):
            continue
        parts, delta = low_rank(weight.shape, generator, "lora_A.weight", "lora_B.weight")
        alpha = 8.0 if module.endswith("to_q") else 4.0
        wanted[module] = weight.double() + delta * (alpha / float(parts.pop("alpha")))
        tensors |= {f"{module}.{ending}": tensor for ending, tensor in parts.items()}
    config = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"attn1.to_q": 8}, "unet.use_rslora": False}
    save_file(tensors, tmp_path / "style.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    mapconv.merge(tmp_path / "style.safetensors", tmp_path / "merged", base=target.path)
    check(target, tmp_path / "merged", wanted)


def test_a_map_adapter_goes_from_a_folder_to_the_single_file(bases, tmp_path):
    spelled, _ = DIALECTS["kohya"]
    wanted = write(spelled, "low-rank", bases["pipeline"], tmp_path / "style.safetensors", dora=False)
    mapconv.upgrade(tmp_path / "style.safetensors", tmp_path / "map", base=bases["pipeline"].path)
    mapconv.merge(tmp_path / "map", tmp_path / "merged.safetensors", base=bases["file"].path)
    check(bases["file"], tmp_path / "merged.safetensors", wanted)
    mapconv.upgrade(tmp_path / "style.safetensors", tmp_path / "other", base=bases["file"].path)
    mapconv.merge(tmp_path / "other", tmp_path / "merged", base=bases["pipeline"].path)
    check(bases["pipeline"], tmp_path / "merged", wanted)
