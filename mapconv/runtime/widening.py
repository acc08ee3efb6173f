"""A model in 16 bit that computes in float32, of which only the blocks that run are held in float32."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

#: Passes in lockstep stand in two blocks at once: some behind the last layer of one, some before the first of the next.
_WIDE_BLOCKS = 2


class WideBlocks:
    """Widens each block of a model when a pass enters it, and gives it its stored values back two blocks later.

    What is written into a wide parameter is lost with it. Of embeddings, which are mostly the largest tensors, only the
    rows that are looked up are widened; a head that is tied to one is a block. Other parameters outside all blocks are
    widened at once.
    """

    def __init__(self, model: torch.nn.Module, names: Iterable[str], merged: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            model: its weights may be of any dtype.
            names: the blocks, none inside another.
            merged: layers by path to which stock PEFT attached an adapter, to be merged while their block is wide:
                unmerged, a DoRA's whole weight and its row norms are formed anew for every batch.
        """
        self._blocks = {name: model.get_submodule(name) for name in names}
        inside = {id(parameter) for block in self._blocks.values() for parameter in block.parameters()}
        lookups, tied = _lookups(model, inside)
        self._blocks |= tied
        self._parameters = {name: list(block.parameters()) for name, block in self._blocks.items()}
        self._wide: OrderedDict[str, list[tuple[torch.nn.Parameter, torch.Tensor]]] = OrderedDict()
        self._merged: dict[str | None, list[Any]] = {}
        for path, layer in (merged or {}).items():
            self._merged.setdefault(block_of(path), []).append(layer)
        inside |= {id(layer.weight) for layer in lookups}
        for parameter in model.parameters():
            if id(parameter) not in inside:
                parameter.data = parameter.data.float()
        self._hooks = [block.register_forward_pre_hook(self._enter(name)) for name, block in self._blocks.items()]
        self._hooks += [layer.register_forward_hook(lambda _, __, rows: rows.float()) for layer in lookups]

    def close(self) -> None:
        """Leave the blocks as they were stored; parameters outside all blocks stay wide."""
        for hook in self._hooks:
            hook.remove()
        while self._wide:
            self._narrow_oldest()

    def _narrow_oldest(self) -> None:
        name, stored = self._wide.popitem(last=False)
        for parameter, values in stored:
            parameter.data = values
        for layer in self._merged.get(name, ()):
            forget_merge(layer)

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if name in self._wide:
                return
            if len(self._wide) == _WIDE_BLOCKS:
                self._narrow_oldest()
            parameters = self._parameters[name]
            self._wide[name] = [(parameter, parameter.data) for parameter in parameters]
            # What is stored in float32 stays what it is where a merge is about to change it.
            for parameter in parameters:
                parameter.data = parameter.data.to(torch.float32, copy=name in self._merged)
            for layer in self._merged.get(name, ()):
                layer.merge()

        return hook


def forget_merge(layer: Any) -> None:
    """Tell a layer of PEFT's whose weights were given back as they were before a merge that nothing is merged.

    Its own ``unmerge`` would compute the update once more, to subtract it from weights that are thrown away.
    """
    layer.merged_adapters.clear()


def _lookups(
    model: torch.nn.Module, inside: Collection[int]
) -> tuple[list[torch.nn.Embedding], dict[str, torch.nn.Module]]:
    """Embeddings outside all blocks that do nothing but look rows up, and the linear layers that are tied to them."""
    owners: dict[int, dict[str, torch.nn.Module]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), {})[name] = layer
    lookups, tied = [], {}
    for name, layer in model.named_modules():
        # One in a wrapper of PEFT's may be asked for its weight.
        if type(layer) is not torch.nn.Embedding or name.endswith("base_layer") or id(layer.weight) in inside:
            continue
        others = {name: other for name, other in owners[id(layer.weight)].items() if other is not layer}
        if all(type(other) is torch.nn.Linear for other in others.values()):
            lookups.append(layer)
            tied |= others
    return lookups, tied


def block_of(path: str) -> str | None:
    """The numbered part of the model that a path lies in, ``model.layers.0``; None for one in none."""
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return None if number is None else ".".join(parts[: number + 1])


def blocks_of(paths: Iterable[str]) -> list[str]:
    """The numbered parts that any of the paths lie in, each once, in their order."""
    return list(dict.fromkeys(name for path in paths if (name := block_of(path)) is not None))
