"""Deep copies of a model in a fraction of ``copy.deepcopy``'s time: it is taken apart once, and put together in C."""

from __future__ import annotations

import copy
import io
import pickle
import types
import weakref
from typing import Any

import torch

#: What ``copy.deepcopy`` shares between the copies too.
_SHARED = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, weakref.ref, torch.dtype)


class Original:
    """A model, or anything else that consists of tensors and of what pickle knows, as it was at this moment."""

    def __init__(self, value: Any) -> None:
        self._apart: list[Any] = []
        buffer = io.BytesIO()
        try:
            _Pickler(buffer, self._apart).dump(value)
        except RuntimeError:  # torch refuses to pickle a module whose weight is parametrised, as a weight norm is
            self._whole = copy.deepcopy(value)
            buffer = None
        self._rest = None if buffer is None else buffer.getvalue()

    def copy(self) -> Any:
        """A copy whose tensors are its own; what was one tensor at two places is one tensor in the copy."""
        if self._rest is None:
            return copy.deepcopy(self._whole)
        return _Unpickler(io.BytesIO(self._rest), self._apart).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, apart: list[Any]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._apart, self._numbers = apart, {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, (torch.Tensor, *_SHARED)):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._apart)
            self._apart.append(_own(value))
        return self._numbers[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, apart: list[Any]) -> None:
        super().__init__(file)
        self._apart, self._made = apart, {}

    def persistent_load(self, number: int) -> Any:
        if number not in self._made:
            self._made[number] = _own(self._apart[number])
        return self._made[number]


def _own(value: Any) -> Any:
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(value.detach().clone(), value.requires_grad)
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
