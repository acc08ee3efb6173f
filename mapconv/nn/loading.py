"""Attach an adapter from its files to a live model: read, place every tensor, check the base, then change the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from mapconv.adapter import Adapter
from mapconv.algebra.norms import product_norm
from mapconv.errors import UnsupportedError
from mapconv.formats import read_adapter
from mapconv.formats.peft import KEY_PREFIX
from mapconv.hub.locate import locate_adapter
from mapconv.metadata.provenance import source_record
from mapconv.nn.attaching import Attached, Trainable, adaptable, attach, check_model, disabled, has_adapters, state_of
from mapconv.nn.checkpoints import serve_trainers
from mapconv.nn.method_files import load_method
from mapconv.nn.placement import place_on_layers
from mapconv.nn.reading import UpdateReader
from mapconv.nn.replication import Replicated, replicate
from mapconv.nn.stacks import StackedParameter, stacked_parameters, wrapped_names
from mapconv.nn.updates import Update
from mapconv.nn.whole import replacements


def load_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    trainable: Trainable = "none",
    check_base: bool = True,
    allow_pickle: bool = False,
) -> nn.Module:
    """Attach a MAP directory, or a LoRA or DoRA adapter, to ``model`` in place, and run with it.

    A LoRA takes the low-rank form and a DoRA the direction ``dora``, both exactly; any other method of PEFT's whose
    layers add an update to the weight has that update as its direction. Its whole tensors
    (heads, biases, token rows) take the base's place while the adapter is active, and are not trained. The base is
    frozen until the last adapter is detached.

    Args:
        model: the model that the adapter was trained on, or a part of it such as ``model.model``.
        path: the adapter's folder, or a Hub reference (``owner/name[@revision][:subfolder]``).
        name: what to call it; several adapters can be attached to one model (``set_adapter``).
        trainable: ``none``, ``scalars`` (α and β: two numbers for each weight) or ``all`` (the factors as well; an
            update that is zero then gets a random B at β = 0, because a zero matrix has no direction to train). Where
            the adapter has stacked parameters, α is not trained: stock PEFT has no DoRA for these.
        check_base: refuse a model whose weights are not those that the MAP directory recorded.
        allow_pickle: read weights from a ``.bin`` file (with torch's weights-only loader).

    Returns:
        The same model.

    Raises:
        MapconvError: of the kind that fits; the model is then as it was.
    """
    if trainable not in get_args(Trainable):
        raise ValueError(f"trainable is {trainable!r}, expected one of {', '.join(get_args(Trainable))}")
    check_model(model, name)
    folder = locate_adapter(path, allow_pickle=allow_pickle)
    adapter = read_adapter(folder, allow_pickle=allow_pickle)
    replicated = _replicated(model, adapter)
    try:
        _attach(model, adapter, name, trainable, check_base)
    except BaseException:
        if replicated is not None:
            replicated.take_back()
        raise
    if replicated is not None:
        state_of(model).replicated = replicated
    serve_trainers(model)
    return model


def _replicated(model: nn.Module, adapter: Adapter) -> Replicated | None:
    """Repeat the model's layers as the adapter has them, if they are not yet."""
    ranges = adapter.settings.layer_replication
    existing = state_of(model).replicated if has_adapters(model) else None
    if has_adapters(model) and ranges != (existing.ranges if existing else ()):
        raise UnsupportedError(
            f"{adapter.path} repeats the layers of the base otherwise (layer_replication) than the adapters that are "
            "on the model: detach these first."
        )
    return replicate(model, ranges) if ranges and existing is None else None


def _attach(model: nn.Module, adapter: Adapter, name: str, trainable: Trainable, check_base: bool) -> None:
    layers = adaptable(model)
    stacks = stacked_parameters(model, adapter.settings.target_parameters)
    placed, rename = place_on_layers(model, adapter, layers, stacks)
    used = [stack for path, stack in stacks.items() if path in {live for _, live in placed}]
    _refuse_other_parameters(model, used, adapter)
    with disabled(model) if has_adapters(model) else nullcontext(), UpdateReader(adapter) as reader:
        method = None
        if adapter.modules and adapter.modules[0].method is not None:
            method, own = load_method(adapter, layers, {module.path: live for module, live in placed}, reader)
            updates: dict[str, Update] = {live: own[live] for _, live in placed}
        else:
            updates = {
                live: reader.stack(module, stacks[live], check_base)
                if live in stacks
                else reader.update(module, live, layers[live], check_base)
                for module, live in placed
            }
        biases = {live: reader.bias(module) for module, live in placed if module.bias is not None}
        others = {key: reader.finite(ref) for key, ref in adapter.others.items()}
        values = {ref.name: others[key] for key, ref in adapter.others.items()}
        replaced = replacements(model, adapter, values, rename, biases)
        others |= {
            f"{KEY_PREFIX}{module.path}.lora_B.bias": reader.bias(module)
            for module, _ in placed
            if module.bias is not None
        }
    if trainable == "all":
        for update in updates.values():
            _revive(update)
    map_config = adapter.map_config or {}
    attached = Attached(
        adapter=adapter,
        paths=tuple(updates),
        options=map_config.get("options") or {},
        replacements=replaced,
        others=others,
        base=map_config.get("base") if check_base else None,
        source=source_record(adapter),
        method=method,
    )
    attach(model, name, updates, attached, trainable, used)
    if used:
        for update in updates.values():
            update.hold_gain()


def _refuse_other_parameters(model: nn.Module, stacks: Sequence[StackedParameter], adapter: Adapter) -> None:
    names: dict[str, list[str]] = {}
    for stack in stacks:
        if stack.values.device.type == "meta":
            raise UnsupportedError(
                f"{stack.parameter} is offloaded, or on the meta device: {adapter.path} puts other values in its "
                "place, so load it into memory."
            )
        names.setdefault(stack.path, []).append(stack.name)
    for path, own in names.items():
        wrapped = wrapped_names(model.get_submodule(path))
        if wrapped and wrapped != own:
            raise UnsupportedError(
                f"{adapter.path} adapts {', '.join(own)} of {path}, and another adapter on the model adapts "
                f"{', '.join(wrapped)}: PEFT tells parameters apart by their number alone, so detach the other first."
            )


def _revive(update: Update) -> None:
    """Give an update of zero a random direction at β = 0, which changes no output but can be trained."""
    if update.direction != "low-rank":
        return
    generator = torch.Generator().manual_seed(0)
    pairs = zip(update.A.detach(), update.B.detach(), strict=True) if update.A.dim() == 3 else [(update.A, update.B)]
    for A, B in pairs:
        if product_norm(B.detach(), A.detach()) == 0.0:
            for factor in (A, B):
                if not factor.any():
                    factor.data.normal_(std=factor.shape[1] ** -0.5, generator=generator)
