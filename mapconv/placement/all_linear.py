"""The linear layers that an adapter does not adapt, where another base changed them: placed, without factors."""

from __future__ import annotations

from dataclasses import replace

import torch

from mapconv.adapter import Module
from mapconv.checkpoint.reader import TensorReader
from mapconv.errors import UnsupportedError
from mapconv.placement.adapters import PlacedAdapter, place_further
from mapconv.placement.model_class import causal_class
from mapconv.placement.skeleton import LiveModel, names_class, typed_model_config
from mapconv.placement.weights import PlacedModule, read_weight


def with_changed_linears(trained: PlacedAdapter, served: PlacedAdapter) -> tuple[PlacedAdapter, PlacedAdapter]:
    """An adapter on two bases, with every further linear layer whose weight differs between them, of rank 0.

    The output head is left out, and what the adapter brings whole. A stack of experts is no linear layer to PEFT, and
    is left out as well. Both bases' further weights are read once, two at a time.

    Raises:
        UnsupportedError: a model without a class in transformers, which alone tells what is linear, or an adapter that
            repeats layers. PlacementError: a layer that the other base lacks.
    """
    if trained.adapter.settings.layer_replication:
        raise UnsupportedError(f"{trained.adapter.path} repeats layers of its base: rebase it without --all-linear.")
    modules = _further(trained)
    pairs = zip(place_further(trained, modules), place_further(served, modules), strict=True)
    with TensorReader(trained.target.checkpoint.source) as own, TensorReader(served.target.checkpoint.source) as other:
        changed = [pair for pair in pairs if not torch.equal(_values(pair[0], own), _values(pair[1], other))]
    return (
        replace(trained, modules=(*trained.modules, *(item for item, _ in changed))),
        replace(served, modules=(*served.modules, *(item for _, item in changed))),
    )


def _further(placed: PlacedAdapter) -> list[Module]:
    """The linear layers of the model's class that the adapter has no part in."""
    target, adapter = placed.target, placed.adapter
    config = target.source_config or typed_model_config(target.folder)
    name = target.class_name or (causal_class(config) if names_class(config) else None)
    if name is None:
        raise UnsupportedError(
            f"transformers has no class for {target.folder}, from which its linear layers would be known: rebase the "
            "adapter without --all-linear."
        )
    live = LiveModel(config, name)
    taken = {item.module.path for item in placed.modules}
    taken |= {path for item in placed.modules for path in _names(item.parameter, live)}
    taken |= {path for item in adapter.whole for path in _names(live.parameter_name(item.parameter), live)}
    saved = [f".{name}." for name in adapter.settings.modules_to_save]
    modules = []
    for path in live.adaptable_paths():
        kind, weight = live.kind(path), f"{path}.weight"
        if kind not in ("linear", "transposed") or path in taken or live.is_vocabulary(weight):
            continue
        # PEFT adapts a module that is saved whole, or an attention of torch's own, as a whole only.
        if any(name in f".{path}." for name in saved) or live.kind(path.rpartition(".")[0]) == "attention":
            continue
        taken |= _names(weight, live)
        shape = live.shapes[weight]
        shape = (shape[0], shape[1]) if kind == "linear" else (shape[1], shape[0])
        modules.append(Module.without_factors(path, shape, adapter.modules[0].lora_A))
    return modules


def _names(parameter: str | None, live: LiveModel) -> set[str]:
    """The modules that hold a parameter, by its own name or one that is tied to it."""
    return set() if parameter is None else {name.removesuffix(".weight") for name in live.tied(parameter)}


def _values(item: PlacedModule, reader: TensorReader) -> torch.Tensor:
    return read_weight(item.weight, reader, torch.empty(item.weight.numel))
