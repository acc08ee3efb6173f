"""The formats that an adapter is written in, and what each can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mapconv.exporting.gguf import gguf_names, write_gguf
from mapconv.exporting.image import write_comfyui, write_diffusers, write_kohya
from mapconv.exporting.imagenames import comfyui_names, diffusers_names, kohya_names
from mapconv.exporting.mlx import write_mlx
from mapconv.exporting.peft import write_peft
from mapconv.exporting.plain import Export
from mapconv.placement.adapters import PlacedAdapter

#: What tells a module from the others of its adapter.
Key = tuple[str, int | None]


@dataclass(frozen=True)
class Format:
    """A format, and what it holds.

    Args:
        name: as ``--to`` has it.
        title: as it is written.
        write: into a folder, or into a file where there is a ``suffix``.
        suffix: of its single file; None: it is a folder.
        dora: whether it holds PEFT's DoRA.
        one_rank: whether all modules have one rank.
        whole: whether it holds whole tensors (heads, token rows) and biases.
        embeddings: whether it holds factors of embeddings.
        dora_embeddings: whether it holds PEFT's DoRA of embeddings.
        convolutions: whether it holds factors of convolutions.
        stacks: whether it holds the factors of a stack of experts.
        names: what the format calls each module that it has a name for; without it every module has one.
    """

    name: str
    title: str
    write: Callable[[Export, Path], None]
    suffix: str | None = None
    dora: bool = False
    one_rank: bool = False
    whole: bool = False
    embeddings: bool = False
    dora_embeddings: bool = False
    convolutions: bool = False
    stacks: bool = False
    names: Callable[[PlacedAdapter], Mapping[Key, str]] | None = None


_PEFT = Format(
    "peft",
    "PEFT",
    write_peft,
    dora=True,
    whole=True,
    embeddings=True,
    dora_embeddings=True,
    convolutions=True,
    stacks=True,
)
_MLX = Format("mlx", "MLX-LM", write_mlx, dora=True, one_rank=True, embeddings=True)
_GGUF = Format("gguf", "GGUF", write_gguf, suffix=".gguf", embeddings=True, names=gguf_names)
_DIFFUSERS = Format("diffusers", "diffusers", write_diffusers, dora=True, convolutions=True, names=diffusers_names)
_KOHYA = Format("kohya", "kohya's sd-scripts", write_kohya, ".safetensors", convolutions=True, names=kohya_names)
_COMFYUI = Format("comfyui", "ComfyUI", write_comfyui, ".safetensors", convolutions=True, names=comfyui_names)

FORMATS = {item.name: item for item in (_PEFT, _DIFFUSERS, _KOHYA, _COMFYUI, _MLX, _GGUF)}
