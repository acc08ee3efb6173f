"""``layer_replication`` in a live model: its list of layers becomes a longer one, whose copies share their weights.

As PEFT has it (``replicate_layers``), but to be taken back. Each copy has updates of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mapconv.errors import UnsupportedError
from mapconv.placement.replication import layer_order, replicate_config

_NAMES = ("num_hidden_layers", "layer_types")
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Replicated:
    """The layers that a model had before, and where; ``config`` is its configuration, with the fields that changed."""

    ranges: Ranges
    parent: nn.Module
    leaf: str
    layers: nn.ModuleList
    config: Any
    fields: Mapping[str, Any]

    def take_back(self) -> None:
        setattr(self.parent, self.leaf, self.layers)
        for name, value in self.fields.items():
            setattr(self.config, name, value)


def replicate(model: nn.Module, ranges: Ranges) -> Replicated:
    """Repeat the model's layers in place: ``((0, 4), (2, 5))`` makes layers 0 1 2 3 2 3 4 of them.

    Raises:
        UnsupportedError: a model whose layers PEFT does not find either. PlacementError: a layer that it has not.
    """
    parent, leaf = _list_of_layers(model)
    layers, config = getattr(parent, leaf), parent.config
    table = {name: getattr(config, name) for name in _NAMES if hasattr(config, name)}
    longer = dict(table) | {"num_hidden_layers": len(layers)}
    replicate_config(longer, ranges)
    copies = nn.ModuleList()
    for number, layer in enumerate(layer_order(ranges)):
        copies.append(_clone(layers[layer]))
        for module in copies[-1].modules():
            if hasattr(module, "layer_idx"):
                vars(module)["layer_idx"] = number
    setattr(parent, leaf, copies)
    for name in table:
        setattr(config, name, longer[name])
    return Replicated(ranges, parent, leaf, layers, config, table)


def _list_of_layers(model: nn.Module) -> tuple[Any, str]:
    """Where PEFT looks for the list."""
    inner: Any = model
    while hasattr(inner, "model"):
        inner = inner.model
    inner = getattr(inner, "bert", inner)
    places = ((inner, "layers"), (getattr(inner, "encoder", None), "layer"), (inner, "h"))
    for parent, leaf in places:
        if isinstance(getattr(parent, leaf, None), nn.ModuleList) and hasattr(parent, "config"):
            return parent, leaf
    raise UnsupportedError(
        f"layer_replication repeats the layers of Llama-, BERT- and Falcon-like models, and {type(model).__name__} is "
        "none of them."
    )


def _clone(layer: nn.Module) -> nn.Module:
    """The same modules anew around the same parameters, buffers and configurations."""
    configs = (module.config for module in layer.modules() if hasattr(module, "config"))
    return copy.deepcopy(layer, {id(item): item for item in (*layer.parameters(), *layer.buffers(), *configs)})
