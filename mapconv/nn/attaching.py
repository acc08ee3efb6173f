"""Put MAP updates on a live model and take them off again: which adapter runs, and what else it brings.

All of it happens in the model that the user has: its layers are wrapped in place, and ``detach`` puts the same module
objects back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mapconv.adapter import Adapter
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.nn.bases import execution_device, kind_of
from mapconv.nn.layers import LAYERS, MapLayer
from mapconv.nn.methods import PeftMethod
from mapconv.nn.replication import Replicated
from mapconv.nn.stacks import MapParameterLayer, StackedParameter, wrap_parameters
from mapconv.nn.updates import Update
from mapconv.nn.whole import Replacement, apply_all, take_back

Trainable = Literal["none", "scalars", "all"]
_STATE = "_map_state"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass
class Attached:
    """One adapter on a model: where it came from (None: made here), and its tensors that are not factors.

    ``paths`` are those of its layers in the live model, and ``method`` is what its updates are of where that is neither
    LoRA nor DoRA. ``others`` has its whole tensors, by PEFT's key. ``base``,
    ``source`` and ``options`` are what ``map_config.json`` records; ``base`` is None where nothing was checked.
    """

    adapter: Adapter | None
    paths: tuple[str, ...]
    options: Mapping[str, Any]
    replacements: tuple[Replacement, ...] = ()
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)
    base: Mapping[str, Any] | None = None
    source: Mapping[str, Any] | None = None
    method: PeftMethod | None = None


@dataclass
class State:
    """What mapconv knows of a model: its adapters, the one that runs, and which parameters trained before.

    ``methods`` are the model's own that something here stands in for, ``hooks`` what hears of its calls, and
    ``replicated`` the repeated layers that it runs with; all are taken off with the last adapter.
    """

    adapters: dict[str, Attached] = field(default_factory=dict)
    active: str | None = None
    trained: list[nn.Parameter] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)
    replicated: Replicated | None = None


def has_adapters(model: nn.Module) -> bool:
    return hasattr(model, _STATE)


def state_of(model: nn.Module) -> State:
    """The model's record.

    Raises:
        AdapterError: no MAP adapter was attached to this module.
    """
    state = getattr(model, _STATE, None)
    if state is None:
        raise AdapterError(
            f"this {type(model).__name__} has no MAP adapter: attach one with load_adapter or get_map_model, and pass "
            "the same module here."
        )
    return state


def named(model: nn.Module, name: str) -> Attached:
    """One adapter's record.

    Raises:
        AdapterError: there is none of that name.
    """
    adapters = state_of(model).adapters
    if name not in adapters:
        raise AdapterError(f"the model has no adapter named {name!r}: it has {', '.join(map(repr, adapters))}.")
    return adapters[name]


def check_model(model: nn.Module, name: str) -> None:
    """Refuse a model that PEFT has wrapped, and a name that is taken or cannot be a part of a parameter's name."""
    # Those of a direction that is another method's are ours.
    own = {id(part) for layer in map_layers(model).values() for part in layer.updates.modules()}
    if any(type(part).__module__.startswith("peft.") and id(part) not in own for part in model.modules()):
        raise UnsupportedError(
            f"this {type(model).__name__} has PEFT's layers in it, whose weights are not the base's: load the base "
            "model itself, or take PEFT's adapter off with its unload()."
        )
    state = getattr(model, _STATE, None)
    if state is not None and name in state.adapters:
        raise AdapterError(f"the model has an adapter named {name!r} already: detach it, or choose another name.")
    if not _NAME.fullmatch(name) or hasattr(nn.ModuleDict, name):
        raise AdapterError(f"{name!r} cannot name an adapter: choose a word of letters, digits, '-' and '_'.")


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can be adapted by its path, as the model has it without adapters."""
    found: dict[str, nn.Module] = {}
    wrapped: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if any(path.startswith(outer) for outer in wrapped[-1:]):
            continue
        if isinstance(module, MapLayer):
            wrapped.append(f"{path}.")
            if not isinstance(module, MapParameterLayer):
                found[path] = module.base_layer
        elif kind_of(module) is not None:
            found[path] = module
    return found


def attach(
    model: nn.Module,
    name: str,
    updates: Mapping[str, Update],
    attached: Attached,
    trainable: Trainable,
    parameters: Sequence[StackedParameter] = (),
) -> None:
    """Put updates on the layers at their paths, and on ``parameters``, and run with them; the base is frozen."""
    if not has_adapters(model):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        setattr(model, _STATE, State(trained=trained))
    wrap_parameters(model, parameters)
    for path, update in updates.items():
        layer = _wrapped(model, path)
        layer.updates[name] = update.to(execution_device(layer.owner, layer.parameter))
        for parameter in update.scalars:
            parameter.requires_grad_(trainable in ("scalars", "all"))
        for parameter in update.factors:
            parameter.requires_grad_(trainable == "all")
    state_of(model).adapters[name] = attached
    set_adapter(model, name)


def _wrapped(model: nn.Module, path: str) -> MapLayer:
    parent, leaf = _parent(model, path)
    module = getattr(parent, leaf)
    if not isinstance(module, MapLayer):
        kind = kind_of(module)
        assert kind is not None  # the paths are those of ``adaptable``
        module = LAYERS[kind](module, path)
        setattr(parent, leaf, module)
    return module


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    outer, _, leaf = path.rpartition(".")
    return model.get_submodule(outer), leaf


def map_layers(model: nn.Module) -> dict[str, MapLayer]:
    """The wrapped layers by their path in the model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MapLayer)}


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Run with the adapter ``name``, or with the base alone (None). No weight moves.

    Raises:
        AdapterError: no adapter of that name. UnsupportedError: another adapter is merged into the weights.
    """
    state = state_of(model)
    if name is not None:
        named(model, name)
    layers = map_layers(model)
    if name != state.active and any(layer.is_merged for layer in layers.values()):
        raise UnsupportedError(f"{state.active!r} is merged into the weights: call unmerge_adapter first.")
    if state.active is not None:
        take_back(state.adapters[state.active].replacements)
    for layer in layers.values():
        layer.active = name if name is not None and name in layer.updates else None
    if name is not None:
        apply_all(state.adapters[name].replacements)
    state.active = name


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that runs; None for the base."""
    return state_of(model).active


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run the base alone inside the block, then what ran before."""
    name = state_of(model).active
    set_adapter(model, None)
    try:
        yield
    finally:
        set_adapter(model, name)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off the model, or all of them (None).

    With the last one the model is what it was: the same module objects, values and ``requires_grad``.

    Raises:
        AdapterError: no adapter of that name.
    """
    state = state_of(model)
    names = list(state.adapters) if name is None else [name]
    for each in names:
        named(model, each)
        if state.active == each:
            for layer in map_layers(model).values():
                layer.unmerge()
            set_adapter(model, None)
        # Layers around parameters nest: the inner ones first.
        for path, layer in reversed(map_layers(model).items()):
            if each in layer.updates:
                del layer.updates[each]
            if not layer.updates:
                parent, leaf = _parent(model, path)
                setattr(parent, leaf, layer.base_layer)
        del state.adapters[each]
    if not state.adapters:
        for parameter in state.trained:
            parameter.requires_grad_(True)
        for method in state.methods:
            delattr(model, method)
        for hook in state.hooks:
            hook.remove()
        if state.replicated is not None:
            state.replicated.take_back()
        delattr(model, _STATE)


def scalar_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The two scalars of every weight that the adapter ``name`` changes: ``relative_alpha`` and ``relative_beta``."""
    return [parameter for update in updates_of(model, name).values() for parameter in update.scalars]


def factor_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """``A``, ``B``, and for the direction dora ``magnitude``, of every weight that the adapter ``name`` changes."""
    return [parameter for update in updates_of(model, name).values() for parameter in update.factors]


@torch.no_grad()
def update_sizes(model: nn.Module, name: str) -> dict[str, list[float]]:
    """‖W' − a·W0‖/‖W0‖ of an adapter's weights by the path of their layer: |β|/‖W0‖, which says how far they moved.

    A layer has one weight, or as many as its stack has. The direction ``dora`` takes a pass over each weight.
    """
    return {path: layer.update(name).sizes(layer.base_layer, path) for path, layer in layers_of(model, name).items()}


def layers_of(model: nn.Module, name: str) -> dict[str, MapLayer]:
    """The wrapped layers that an adapter changes by their path, in the adapter's order."""
    return {path: cast(MapLayer, model.get_submodule(path)) for path in named(model, name).paths}


def updates_of(model: nn.Module, name: str) -> dict[str, Update]:
    """An adapter's updates by the path of their layer, in the adapter's order."""
    return {path: layer.update(name) for path, layer in layers_of(model, name).items()}
