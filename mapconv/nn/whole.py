"""An adapter's whole tensors: heads, biases, trained token rows. They take the base's place while it runs.

A saved module (``modules_to_save``) and trained rows belong to names of their own, so the module gets another
parameter; a tensor that PEFT writes into the base's own parameter shows under every name that is tied to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mapconv.adapter import Adapter, WholeTensor
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.nn.layers import MapLayer
from mapconv.nn.placement import Rename
from mapconv.placement.by_name import nearest


@dataclass(frozen=True)
class Replacement:
    """One parameter of a module, what it is without the adapter, and what it is with it."""

    module: nn.Module
    leaf: str
    base: nn.Parameter
    value: nn.Parameter


def apply_all(replacements: Iterable[Replacement]) -> None:
    for item in replacements:
        item.module._parameters[item.leaf] = item.value


def take_back(replacements: Iterable[Replacement]) -> None:
    for item in replacements:
        item.module._parameters[item.leaf] = item.base


def replacements(
    model: nn.Module,
    adapter: Adapter,
    values: Mapping[str, torch.Tensor],
    rename: Rename,
    biases: Mapping[str, torch.Tensor],
) -> tuple[Replacement, ...]:
    """All parameters that change, checked before any of them does.

    Args:
        values: the whole tensors' values by their name in the file.
        rename: how the adapter's parameters are spelled in this model.
        biases: what is added to the bias of the layer at a live path (``lora_bias``).

    Raises:
        PlacementError: a tensor without a parameter of its shape. UnsupportedError: one that cannot be replaced.
    """
    slots = _slots(model)
    changed: dict[str, torch.Tensor] = {}
    rows = [item for item in adapter.whole if item.rows is not None]
    own_rows = {_live_name(item, slots, rename) for item in rows}
    # Rows are cut into what the adapter's other tensors have made of the parameter.
    for item in sorted(adapter.whole, key=lambda item: item.rows is not None):
        name = _live_name(item, slots, rename)
        value = values[item.tensor.name]
        tied = [other for other in slots if slots[other].parameter is slots[name].parameter]
        names = tied if item.in_place else [name]
        if item.rows is not None and _ties_embeddings(model):
            names = [other for other in tied if other == name or other not in own_rows]
        for each in names:
            changed[each] = _changed(item, value, changed.get(each, slots[each].parameter), each)
    for path, value in biases.items():
        name = f"{path}.bias"
        if name not in slots:
            raise UnsupportedError(
                f"lora_bias adds to the bias of {path}, but the base has none: train without lora_bias, or on a layer "
                "that has a bias."
            )
        bias = changed.get(name, slots[name].parameter.detach())
        changed[name] = (bias.double() + value.to(bias.device).double()).to(bias.dtype)
    # Names that were tied and become the same stay one parameter.
    made: dict[tuple[int, int], nn.Parameter] = {}
    return tuple(_replacement(slots[name], value, made) for name, value in changed.items())


@dataclass(frozen=True)
class _Slot:
    module: nn.Module
    leaf: str

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.module._parameters[self.leaf]
        assert parameter is not None  # _slots leaves out the names without one
        return parameter


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Every parameter's place by the name that it has without adapters."""
    slots = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MapLayer) or ".updates." in f".{path}.":
            continue
        plain = path.replace(".base_layer", "")
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                slots[f"{plain}.{leaf}".removeprefix(".")] = _Slot(module, leaf)
    return slots


def _live_name(item: WholeTensor, slots: Mapping[str, _Slot], rename: Rename) -> str:
    for name in (rename(item.parameter), item.parameter):
        if name in slots:
            return name
    shapes = {name: slot.parameter.shape for name, slot in slots.items()}
    raise PlacementError(
        f"{item.tensor.name}: the model has no parameter {item.parameter}{nearest(item.parameter, shapes)}: load the "
        "model with the head that the adapter was trained with."
    )


def _changed(item: WholeTensor, value: torch.Tensor, current: torch.Tensor, name: str) -> torch.Tensor:
    fits = value.shape == current.shape if item.rows is None else value.shape[1:] == current.shape[1:]
    if not fits or (item.rows is not None and max(item.rows) >= current.shape[0]):
        raise PlacementError(
            f"{item.tensor.name} is {list(value.shape)}, but {name} is {list(current.shape)} in the model: give it the "
            "same number of labels or tokens first (num_labels, resize_token_embeddings)."
        )
    if current.device.type == "meta":
        raise UnsupportedError(f"{name} is offloaded or on the meta device, so {item.tensor.name} cannot replace it.")
    value = value.to(device=current.device, dtype=current.dtype)
    if item.rows is None:
        return value
    result = current.detach().clone()
    result[list(item.rows)] = value
    return result


def _replacement(slot: _Slot, value: torch.Tensor, made: dict[tuple[int, int], nn.Parameter]) -> Replacement:
    key = (id(slot.parameter), value.data_ptr())
    if key not in made:
        made[key] = nn.Parameter(value, requires_grad=False)
    return Replacement(slot.module, slot.leaf, slot.parameter, made[key])


def _ties_embeddings(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return getattr(config, "tie_word_embeddings", False) is True
