"""The names of a CLIP text encoder's layers: transformers' with and without the model's prefix, and OpenCLIP's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mapconv.placement.spelling.location import Location, Segment, whole

_PREFIX = "text_model."
_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(?P<number>\d{1,4})\.(?P<layer>.+)")
_BLOCK = re.compile(r"transformer\.resblocks\.(?P<number>\d{1,4})\.(?P<layer>.+)")
_LAYERS = {
    "attn.out_proj.weight": "self_attn.out_proj",
    "mlp.c_fc.weight": "mlp.fc1",
    "mlp.c_proj.weight": "mlp.fc2",
    "ln_1.weight": "layer_norm1",
    "ln_2.weight": "layer_norm2",
}


def text_names(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Location]]:
    """transformers 5 saves ``CLIPTextModel`` without the prefix of published adapters; OpenCLIP has other names."""
    own = {layer: name.removesuffix(".weight") for name, layer in _LAYERS.items()}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if path == name:
            continue
        if path.startswith(_PREFIX):
            yield path.removeprefix(_PREFIX), whole(name, shape)
        block = _LAYER.fullmatch(path)
        if block is not None and block["layer"] in own:
            yield f"transformer.resblocks.{int(block['number'])}.{own[block['layer']]}", whole(name, shape)
        if not path.startswith(_PREFIX) and path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")):
            yield _PREFIX + path, whole(name, shape)


def open_clip_names(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Location]]:
    """OpenCLIP keeps q, k and v in one matrix, and its projection transposed; adapters have transformers' names."""
    for name, shape in shapes.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            continue
        path = f"{_PREFIX}encoder.layers.{int(block['number'])}."
        if block["layer"] == "attn.in_proj_weight":
            rows = shape[0] // 3
            for place, part in enumerate(("q_proj", "k_proj", "v_proj")):
                yield f"{path}self_attn.{part}", (Segment(name, place * rows, rows),)
        elif block["layer"] in _LAYERS:
            yield path + _LAYERS[block["layer"]], whole(name, shape)
    projection = shapes.get("text_projection", ())
    if len(projection) == 2 and "ln_final.weight" in shapes:
        yield "text_projection", (Segment("text_projection", 0, projection[1], transposed=True),)
