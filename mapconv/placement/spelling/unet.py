"""The two names of a Stable Diffusion U-Net's layers: diffusers', and those of its first authors (ldm, sgm).

Blocks are counted level by level in diffusers, and one after another in ldm: a level has ``layers`` residual blocks on
the way down, one more on the way up, and a sampler. The same blocks follow from either naming's own numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.1": "mid_block.attentions.0",
}
#: A hostile file may name a block of any number.
_MOST = 64


def other_names(paths: Collection[str]) -> Iterator[tuple[str, str]]:
    """(path, the other naming's name for it) of each layer of a U-Net in either naming; nothing for another model."""
    down = _numbers(r"down_blocks\.(\d+)\.resnets\.(\d+)\.conv1", paths)
    if down:
        attended = {level for level, _ in _numbers(r"up_blocks\.(\d+)\.attentions\.(\d+)\.proj_in", paths)}
        levels, layers = 1 + max(level for level, _ in down), 1 + max(layer for _, layer in down)
        table = {name: ldm for ldm, name in _blocks(levels, layers, attended)}
    else:
        samplers = sorted(number for number, _ in _numbers(r"input_blocks\.(\d+)\.(0)\.op", paths))
        blocks = {number for number, _ in _numbers(r"input_blocks\.(\d+)\.(0)\.in_layers\.2", paths)}
        if not blocks:
            return
        layers = samplers[0] - 1 if samplers else max(blocks)
        up = _numbers(r"output_blocks\.(\d+)\.(\d+)\.conv", paths)
        attended = {number // (layers + 1) for number, place in up if place == 2}
        table = dict(_blocks(len(samplers) + 1, layers, attended))
    for path in paths:
        head = next((head for head in _heads(path) if head in table), None)
        if head is not None:
            yield path, table[head] + path[len(head) :]


def _blocks(levels: int, layers: int, attended: Collection[int]) -> Iterator[tuple[str, str]]:
    """(ldm's, diffusers' name) of all that has a name of its own in either."""
    yield from _OUTSIDE.items()
    yield from _residual("middle_block.0", "mid_block.resnets.0")
    yield from _residual("middle_block.2", "mid_block.resnets.1")
    for level in range(min(levels, _MOST)):
        for layer in range(min(layers + 1, _MOST)):
            number = 1 + level * (layers + 1) + layer
            if layer < layers:
                yield from _residual(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}")
                yield f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{layer}"
            else:
                yield f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            number -= 1
            yield from _residual(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{layer}")
            if level in attended:
                yield f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{layer}"
        place = 2 if level in attended else 1
        yield f"output_blocks.{level * (layers + 1) + layers}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"


def _residual(ldm: str, name: str) -> Iterator[tuple[str, str]]:
    for own, other in _RESIDUAL.items():
        yield f"{ldm}.{own}", f"{name}.{other}"


def _heads(path: str) -> Iterator[str]:
    """The path, and what is left of it without its last part, and so on."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _numbers(pattern: str, paths: Collection[str]) -> set[tuple[int, int]]:
    found = (re.fullmatch(pattern, path) for path in paths)
    return {(int(match[1]), int(match[2])) for match in found if match is not None and len(match[0]) < 100}
