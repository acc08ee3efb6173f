"""The two names of a Flux transformer's layers: diffusers', and those of its authors (Black Forest Labs).

The authors keep q, k and v in one matrix, in a single block with the first half of its feed-forward layer; diffusers
keeps each apart, and has the two halves of the last modulation the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from mapconv.placement.spelling.location import Location, Segment, whole

_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_KINDS = ("double", "transformer_blocks", _DOUBLE), ("single", "single_transformer_blocks", _SINGLE)
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_LAST = "final_layer.adaLN_modulation.1", "norm_out.linear"
_BLOCK = re.compile(r"(?P<kind>double|single)_blocks\.(?P<number>\d{1,4})\.(?P<layer>.+)\.weight")
_SIGNS = ("double_blocks.0.img_attn.qkv.weight", "transformer_blocks.0.attn.add_q_proj.weight")


def flux_names(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Location]]:
    """The other naming's modules of a Flux transformer in either naming; nothing for another model."""
    if _SIGNS[0] in shapes:
        yield from _of_authors(shapes)
    elif _SIGNS[1] in shapes and "x_embedder.weight" in shapes:
        yield from _of_diffusers(shapes)


def _of_authors(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Location]]:
    for name, shape in shapes.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            continue
        double = block["kind"] == "double"
        parts = (_DOUBLE if double else _SINGLE).get(block["layer"], ())
        path = f"{'' if double else 'single_'}transformer_blocks.{int(block['number'])}."
        offset = 0
        for place, part in enumerate(parts):
            rows = shape[-1] if place + 1 < len(parts) else shape[0] - offset
            yield path + part, (Segment(name, offset, rows),)
            offset += rows
    for own, other in _OUTSIDE.items():
        if f"{own}.weight" in shapes:
            yield other, whole(f"{own}.weight", shapes[f"{own}.weight"])
    yield from _swapped(*_LAST, shapes)


def _of_diffusers(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Location]]:
    for prefix, kind, table in (
        ("transformer_blocks", "double", _DOUBLE),
        ("single_transformer_blocks", "single", _SINGLE),
    ):
        count = sum(1 for name in shapes if re.fullmatch(rf"{prefix}\.\d+\.attn\.to_q\.weight", name))
        for number in range(count):
            for layer, parts in table.items():
                names = [f"{prefix}.{number}.{part}.weight" for part in parts]
                if all(name in shapes for name in names):
                    yield f"{kind}_blocks.{number}.{layer}", _joined(names, shapes)
    for other, own in _OUTSIDE.items():
        if f"{own}.weight" in shapes:
            yield other, whole(f"{own}.weight", shapes[f"{own}.weight"])
    flux, diffusers = _LAST
    yield from _swapped(diffusers, flux, shapes)


def _joined(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> Location:
    return tuple(segment for name in names for segment in whole(name, shapes[name]))


def _swapped(own: str, other: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Location]]:
    """The last modulation: shift and scale of the one naming are scale and shift of the other."""
    shape = shapes.get(f"{own}.weight")
    if shape is not None:
        half = shape[0] // 2
        yield other, (Segment(f"{own}.weight", half, half), Segment(f"{own}.weight", 0, half))
