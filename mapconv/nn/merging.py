"""Merge the running adapter into the live model's weights, and take it out again to the same bytes."""

from __future__ import annotations

import torch
from torch import nn

from mapconv.errors import OutputError, UnsupportedError
from mapconv.nn.attaching import map_layers, state_of
from mapconv.nn.layers import MapLayer
from mapconv.nn.updates import Update


@torch.no_grad()
def merge_adapter(model: nn.Module) -> None:
    """Put W' of the active adapter in the place of every weight that it changes, computed wide and rounded once.

    The base's own weights are kept beside the merged ones, in the same memory as before, so that ``unmerge_adapter``
    restores their bytes: a merged model takes twice the memory of its adapted weights until then. A tied weight is
    merged under the adapted layer's name alone. To merge files, use ``mapconv.merge``.

    Raises:
        UnsupportedError: no adapter is active, or a layer's weight is not in memory (accelerate's offload).
        OutputError: W' overflows the weight's dtype; the model is then as before.
    """
    active = state_of(model).active
    if active is None:
        raise UnsupportedError("no adapter is active: choose the one to merge with set_adapter.")
    layers = [layer for layer in map_layers(model).values() if layer.active is not None and not layer.is_merged]
    for layer in layers:
        if layer.owner._parameters[layer.parameter].device.type == "meta":
            raise UnsupportedError(
                f"the weight of {layer.path} is offloaded, and cannot be merged in place: merge the files with "
                "`mapconv merge`."
            )
    try:
        for layer in layers:
            _merge(layer, layer.update(active))
    except BaseException:
        unmerge_adapter(model)
        raise


def unmerge_adapter(model: nn.Module) -> None:
    """Put the base's own weights back; a model that is not merged stays as it is."""
    for layer in map_layers(model).values():
        layer.unmerge()


def _merge(layer: MapLayer, update: Update) -> None:
    weight = layer.owner._parameters[layer.parameter]
    merged = layer.merged_weight(update, torch.promote_types(weight.dtype, torch.float32))
    merged = torch.empty_like(weight).copy_(merged)
    if not torch.isfinite(merged).all():
        raise OutputError(
            f"the merged weight of {layer.path} does not fit in {str(weight.dtype).removeprefix('torch.')}."
        )
    layer.unmerged_weight = weight
    layer.owner._parameters[layer.parameter] = nn.Parameter(merged, requires_grad=False)
