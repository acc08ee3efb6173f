"""What the formats of image adapters call the modules of a base, whichever naming the base itself has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mapconv.checkpoint.model_config import read_model_config
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.spelling.components import components_of
from mapconv.placement.spelling.location import Segment
from mapconv.placement.spelling.names import SpelledNames
from mapconv.placement.weights import PlacedModule

Key = tuple[str, int | None]
#: How the authors of Stable Diffusion and of Flux name the layers of a denoiser.
_AUTHORS = (
    "input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.",
    "double_blocks.", "single_blocks.", "img_in", "txt_in", "time_in.", "vector_in.", "guidance_in.", "final_layer.",
)  # fmt: skip
_FLUX = ("transformer_blocks.", "single_transformer_blocks.")
_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")


def diffusers_names(placed: PlacedAdapter) -> dict[Key, str]:
    """``unet.down_blocks.0…``: a module that the base keeps fused with others has no name there."""

    def name(role: str, paths: list[str]) -> str | None:
        if role != "denoiser":
            return f"{role}.{paths[0]}"
        own = next((path for path in paths if not path.startswith(_AUTHORS)), None)
        return None if own is None else f"{_denoiser(own)}.{own}"

    return _named(placed, name)


def kohya_names(placed: PlacedAdapter) -> dict[Key, str]:
    """``lora_unet_…``: diffusers' names for Stable Diffusion 1, the authors' for Flux, else the base's own."""
    return _named(placed, _kohya(placed))


def comfyui_names(placed: PlacedAdapter) -> dict[Key, str]:
    """Kohya's names for U-Nets and text encoders; other denoisers by the base's own names, whose dots stay."""
    kohya = _kohya(placed)

    def name(role: str, paths: list[str]) -> str | None:
        if role != "denoiser" or _denoiser(paths[0]) == "unet":
            return kohya(role, paths)
        return f"{'diffusion_model' if paths[0].startswith(_AUTHORS) else 'transformer'}.{paths[0]}"

    return _named(placed, name)


def _kohya(placed: PlacedAdapter) -> Callable[[str, list[str]], str | None]:
    tensors = placed.target.checkpoint.tensors
    several = any(name.startswith(("text_encoder_2.", "conditioner.embedders.1.")) for name in tensors)
    is_first = any(name.startswith("cond_stage_model.") for name in tensors)
    is_flux = any(name.endswith(("x_embedder.weight", "double_blocks.0.img_attn.qkv.weight")) for name in tensors)

    def name(role: str, paths: list[str]) -> str | None:
        if role in _TEXT:
            prefix = f"lora_te{1 + _TEXT.index(role)}_" if several else "lora_te_"
            return prefix + paths[0].replace(".", "_")
        own: str | None = paths[0]
        if is_first and paths[0].startswith(_AUTHORS):
            own = next((path for path in paths if not path.startswith(_AUTHORS)), None)
        elif is_flux and paths[0].startswith(_FLUX):
            own = next((path for path in paths if path.startswith(_AUTHORS)), None)
        return None if own is None else f"lora_unet_{own.replace('.', '_')}"

    return name


def _named(placed: PlacedAdapter, name: Callable[[str, list[str]], str | None]) -> dict[Key, str]:
    """Every module that has a name, by what ``name`` makes of its role in the pipeline and its paths there."""
    found = {item.key: name(role, paths) for item, role, paths in _spelled(placed)}
    return {key: text for key, text in found.items() if text is not None}


def _spelled(placed: PlacedAdapter) -> Iterator[tuple[PlacedModule, str, list[str]]]:
    checkpoint = placed.target.checkpoint
    try:
        config = {} if checkpoint.is_file else read_model_config(checkpoint.folder)
    except FileNotFoundError:
        config = {}
    shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    table = SpelledNames(shapes, components_of(checkpoint, config)).spelled()
    for item in placed.modules:
        pieces = item.weight.pieces
        location = tuple(
            Segment(piece.tensor.name, piece.offset, piece.stop - piece.start, piece.transposed) for piece in pieces
        )
        component, paths = table.get(location, (None, []))
        if component is None or not component.roles or item.experts > 1:
            continue
        role = component.roles[0]
        if role in _TEXT:
            # Published adapters have the model's prefix, which transformers 5 no longer saves.
            paths = sorted(paths, key=lambda path: not path.startswith("text_model."))
        if role in ("denoiser", *_TEXT):
            yield item, role, paths


def _denoiser(path: str) -> str:
    """diffusers' folder of the denoiser that a layer is of."""
    unet = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
    authors = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
    return "unet" if path.startswith((*unet, *authors)) else "transformer"
