"""A model in 16 bit that computes in float32, of which only the blocks that run are held in float32."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch

#: Passes in lockstep stand in two blocks at once: some behind the last layer of one, some before the first of the next.
_WIDE_BLOCKS = 2


class WideBlocks:
    """Widens each block of a model when a pass enters it, and narrows the one before the last again.

    What is written into a wide parameter stays, rounded to the dtype that it had. Parameters outside all blocks are
    widened at once.
    """

    def __init__(self, model: torch.nn.Module, names: Iterable[str]) -> None:
        self._blocks = {name: model.get_submodule(name) for name in names}
        self._wide: OrderedDict[str, list[tuple[torch.nn.Parameter, torch.dtype]]] = OrderedDict()
        inside = {id(parameter) for block in self._blocks.values() for parameter in block.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in inside:
                parameter.data = parameter.data.float()
        self._hooks = [block.register_forward_pre_hook(self._enter(name)) for name, block in self._blocks.items()]

    def close(self) -> None:
        """Leave the blocks as they were stored; parameters outside all blocks stay wide."""
        for hook in self._hooks:
            hook.remove()
        while self._wide:
            self._narrow_oldest()

    def _narrow_oldest(self) -> None:
        for parameter, dtype in self._wide.popitem(last=False)[1]:
            parameter.data = parameter.data.to(dtype)

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if name in self._wide:
                return
            if len(self._wide) == _WIDE_BLOCKS:
                self._narrow_oldest()
            parameters = list(self._blocks[name].parameters())
            self._wide[name] = [(parameter, parameter.dtype) for parameter in parameters]
            for parameter in parameters:
                parameter.data = parameter.data.float()

        return hook
