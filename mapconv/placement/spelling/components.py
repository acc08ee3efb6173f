"""The models that a base is made of, and what each is to an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mapconv.checkpoint.index import Checkpoint
from mapconv.placement.spelling.names import Component
from mapconv.spelling import Spelling

_DENOISERS = ("unet", "transformer", "prior")
#: Where a single file of a whole pipeline keeps its models: Stable Diffusion 1 and 2, SDXL, SD3, and a denoiser alone.
_PREFIXES = (
    Component(("denoiser",), "model.diffusion_model."),
    Component(("denoiser",), "diffusion_model."),
    Component(("text_encoder",), "cond_stage_model.transformer."),
    Component(("text_encoder",), "cond_stage_model.model."),
    Component(("text_encoder",), "conditioner.embedders.0.transformer."),
    Component(("text_encoder_2",), "conditioner.embedders.1.model."),
    Component(("text_encoder",), "text_encoders.clip_l.transformer."),
    Component(("text_encoder_2",), "text_encoders.clip_g.transformer."),
    Component(("text_encoder_3",), "text_encoders.t5xxl.transformer."),
    Component(("vae",), "first_stage_model."),
)
#: How names begin in a file of a denoiser alone, in which they stand without a prefix: Flux, SD3, U-Nets, Wan.
_DENOISER_NAMES = (
    "double_blocks.", "single_blocks.", "joint_blocks.", "input_blocks.", "transformer_blocks.", "down_blocks.",
    "patch_embedding.",
)  # fmt: skip
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def components_of(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[Component, ...]:
    """Every model of a base, by its folders, by its tensors' names, or by its configuration."""
    if checkpoint.models:
        names = [model.folder.name for model in checkpoint.models]
        return tuple(Component(("denoiser" if name in _DENOISERS else name,), f"{name}.") for name in names)
    found = tuple(part for part in _PREFIXES if any(name.startswith(part.prefix) for name in checkpoint.tensors))
    if found:
        return found
    if "_class_name" in config or any(name.startswith(_DENOISER_NAMES) for name in checkpoint.tensors):
        return (Component(("denoiser",)),)
    if any(str(name).endswith(("TextModel", "TextModelWithProjection", "EncoderModel")) for name in _classes(config)):
        return (Component(_TEXT_ENCODERS),)
    return (Component(()),)


def spelling_of(path: str) -> Spelling:
    """What a module's full path means on another base: which model it is in, and its name there."""
    folder, _, name = path.partition(".")
    if folder in (*_DENOISERS, *_TEXT_ENCODERS, "vae"):
        return Spelling(("denoiser",) if folder in _DENOISERS else (folder,), name, flat=False)
    for part in _PREFIXES:
        if path.startswith(part.prefix):
            return Spelling(part.roles, path.removeprefix(part.prefix), flat=False)
    return Spelling(("denoiser", *_TEXT_ENCODERS), path, flat=False)


def _classes(config: Mapping[str, Any]) -> list[Any]:
    names = config.get("architectures")
    return names if isinstance(names, list) else []
