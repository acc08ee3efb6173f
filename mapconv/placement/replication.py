"""``layer_replication``: a model whose layers repeat, written out with every copy in its place.

PEFT builds ``[[0, 4], [2, 5]]`` into layers 0 1 2 3 2 3 4 that share their base weights and have adapters of their own
(``replicate_layers``). A merged checkpoint must hold each copy.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

from mapconv.adapter import TensorRef
from mapconv.checkpoint.index import Checkpoint
from mapconv.errors import PlacementError

#: Where PEFT looks for the list of layers (Llama-, BERT- and Falcon-like models).
_LAYER = re.compile(r"^((?:.*\.)?(?:layers|encoder\.layer|h)\.)(\d+)(\..+)$")


def replicate_config(config: dict[str, Any], ranges: tuple[tuple[int, int], ...]) -> None:
    """Turn a configuration into that of the longer model, in place."""
    order = layer_order(ranges)
    layers = config.get("num_hidden_layers") or 0
    if max(order) >= layers:
        raise PlacementError(f"layer_replication names layer {max(order)}, but the base has {layers}.")
    config["num_hidden_layers"] = len(order)
    if isinstance(config.get("layer_types"), list):
        if len(config["layer_types"]) != layers:
            raise PlacementError(
                f"the base's layer_types name {len(config['layer_types'])} layers, but it has {layers}."
            )
        config["layer_types"] = [config["layer_types"][layer] for layer in order]


def replicated_checkpoint(checkpoint: Checkpoint, ranges: tuple[tuple[int, int], ...]) -> Checkpoint:
    """The checkpoint with every layer's tensors under each number that the layer has in the longer model."""
    copies: dict[int, list[int]] = defaultdict(list)
    for number, layer in enumerate(layer_order(ranges)):
        copies[layer].append(number)

    def expand(ref: TensorRef) -> list[TensorRef]:
        match = _LAYER.match(ref.name)
        if match is None:
            return [ref]
        return [replace(ref, name=f"{match[1]}{number}{match[3]}") for number in copies[int(match[2])]]

    files = tuple(
        replace(file, tensors=tuple(new for ref in file.tensors for new in expand(ref))) for file in checkpoint.files
    )
    return replace(checkpoint, files=files, tensors={ref.name: ref for file in files for ref in file.tensors})


def layer_order(ranges: tuple[tuple[int, int], ...]) -> list[int]:
    """The base's layer at each place of the longer model."""
    return [layer for start, stop in ranges for layer in range(start, stop)]
