"""Parameters that no layer of their own runs, such as a stack of experts: W' takes their place in a forward pass.

PEFT's ``target_parameters`` name them. A stack (E, n, m), or (E, m, n) where its module says that it is transposed, is
E weights, each with its own β. α stays ‖W0‖: another one would be a DoRA to stock PEFT, which has none for parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mapconv.nn.bases import kind_of, values_in
from mapconv.nn.layers import MapLayer
from mapconv.nn.updates import Update

_INNER = ".base_layer"


@dataclass(frozen=True)
class StackedParameter:
    """A parameter of a module of the model, as E weights (n, m).

    ``path`` is the module's, and ``name`` the parameter's in it.
    """

    module: nn.Module
    path: str
    name: str

    @property
    def parameter(self) -> str:
        return f"{self.path}.{self.name}"

    @property
    def values(self) -> nn.Parameter:
        found = self.module._parameters[self.name]
        assert found is not None  # it was found among the module's parameters
        return found

    @property
    def is_stack(self) -> bool:
        """Whether each expert has an entry of its own in a MAP directory; a router's matrix is one weight."""
        return self.values.dim() == 3

    @property
    def count(self) -> int:
        return self.values.shape[0] if self.is_stack else 1

    @property
    def experts(self) -> tuple[int | None, ...]:
        """What the entries of a MAP directory call the weights."""
        return tuple(range(self.count)) if self.is_stack else (None,)

    @property
    def is_transposed(self) -> bool:
        return self.is_stack and bool(getattr(self.module, "is_transposed", False))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(n, m) of each weight."""
        height, width = self.values.shape[-2:]
        return (width, height) if self.is_transposed else (height, width)

    @contextmanager
    def weights(self) -> Iterator[torch.Tensor]:
        """All of them as a view (E, n, m).

        Raises:
            UnsupportedError: values that are not in memory, or that are codes.
        """
        with values_in(self.module, self.name, self.parameter) as values:
            stack = values if self.is_stack else values[None]
            yield stack.mT if self.is_transposed else stack


class StackUpdate(Update):
    """The updates of E weights: A (E, r, m), B (E, n, r), ``relative_beta`` (E,) in units of each weight's ‖W0‖."""

    def __init__(
        self,
        A: torch.Tensor,
        B: torch.Tensor,
        *,
        relative_betas: Sequence[float],
        base_norms: Sequence[float],
        base_projections: Sequence[float | None],
    ) -> None:
        super().__init__(A, B, relative_alpha=1.0, relative_beta=0.0, base_norm=0.0)
        del self.relative_alpha, self._exact["alpha"], self.base_norm, self.base_projection
        self.relative_beta = nn.Parameter(torch.tensor(relative_betas, dtype=A.dtype), requires_grad=False)
        self._exact["beta"] = list(relative_betas)
        self.base_norms, self.base_projections = tuple(base_norms), tuple(base_projections)

    @property
    def scalars(self) -> list[nn.Parameter]:
        return [self.relative_beta]

    @property
    def _unit(self) -> torch.Tensor:
        return torch.tensor([norm or 1.0 for norm in self.base_norms], dtype=torch.float64, device=self.A.device)

    def hold_gain(self) -> None:
        pass  # it is always held

    def gains(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, b), both (E,)."""
        b = self.update_gain()
        return torch.ones_like(b), b

    def betas(self) -> list[float]:
        """β of every weight, in the unit of the weights."""
        given = self.origin.scalars if self.origin else ()
        if given and self._is_as_given("beta"):
            return [scalars.beta for scalars in given]
        relative = self.all_exact("beta")
        return [value * (norm or 1.0) for value, norm in zip(relative, self.base_norms, strict=True)]

    def sizes(self, base: nn.Module, path: str) -> list[float]:
        return [abs(beta) for beta in self.relative_beta.tolist()]

    def merged(self, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """W0 + b·BA of every weight, as (E, n, m) or for a transposed view of ``weights`` in its order of storage."""
        left, right = (self.B * self.update_gain()[:, None, None]).to(dtype), self.A.to(dtype)
        if weights.is_contiguous():
            return torch.baddbmm(weights.to(dtype), left, right)
        return torch.baddbmm(weights.mT.to(dtype), right.mT, left.mT).mT


class MapParameterLayer(MapLayer):
    """A module that runs with W' in the place of one of its parameters; for several of them such layers nest.

    A forward pass forms W' whole, as PEFT's does.
    """

    def __init__(self, base_layer: nn.Module, path: str, name: str) -> None:
        super().__init__(base_layer, path)
        self.name = name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(_innermost(self), name)

    @property
    def owner(self) -> Any:
        return _innermost(self)

    @property
    def parameter(self) -> str:
        return self.name

    @property
    def target(self) -> StackedParameter:
        return StackedParameter(self.owner, self.path.replace(_INNER, ""), self.name)

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        if self.active is None or self.is_merged:
            return self.base_layer(*arguments, **settings)
        # Autocast would round W', where a float32 layer is only rounded as it is used.
        with torch.autocast(self.target.values.device.type, enabled=False):
            merged = self.merged_weight(self.update(self.active), self.target.values.dtype)
        place = ".".join([*["base_layer"] * (len(wrapped_names(self)) - 1), self.name])
        return functional_call(self.base_layer, {place: merged}, arguments, settings, tie_weights=False)

    def merged_weight(self, update: Update, dtype: torch.dtype) -> torch.Tensor:
        assert isinstance(update, StackUpdate)  # no other update is put on a parameter
        with self.target.weights() as weights:
            return self._stored(update.merged(weights, dtype))

    def _stored(self, weights: torch.Tensor) -> torch.Tensor:
        """(E, n, m) as the module keeps them."""
        target = self.target
        stack = weights.mT if target.is_transposed else weights
        return stack if target.is_stack else stack[0]


def stacked_parameters(model: nn.Module, targets: Sequence[str]) -> dict[str, StackedParameter]:
    """The parameters that ``target_parameters`` names by the path that PEFT gives each.

    Of several parameters of one module PEFT wraps the first innermost: the last one has the module's own path, and each
    one before it has a ``.base_layer`` more.
    """
    found: dict[str, StackedParameter] = {}
    for path, module in model.named_modules():
        module = _innermost(module)
        # The weight of a layer is adapted as that of a layer.
        if not targets or _INNER in f".{path}" or isinstance(module, MapLayer) or kind_of(module) is not None:
            continue
        names = [
            name
            for name, _ in module.named_parameters(recurse=False)
            if any(f".{path}.{name}".endswith(f".{target}") for target in targets)
        ]
        for depth, name in enumerate(reversed(names)):
            found[f"{path}{_INNER * depth}"] = StackedParameter(module, path, name)
    return found


def wrap_parameters(model: nn.Module, targets: Sequence[StackedParameter]) -> None:
    """Put a ``MapParameterLayer`` around the module of every parameter that has none yet."""
    names: dict[str, list[str]] = {}
    for target in targets:
        names.setdefault(target.path, []).append(target.name)
    for path, outermost_first in names.items():
        outer, _, leaf = path.rpartition(".")
        parent, module = model.get_submodule(outer), model.get_submodule(path)
        if isinstance(module, MapParameterLayer):
            continue
        for depth, name in reversed(list(enumerate(outermost_first))):
            module = MapParameterLayer(module, f"{path}{_INNER * depth}", name)
        setattr(parent, leaf, module)


def wrapped_names(module: nn.Module) -> list[str]:
    """The parameters that the layers around a module adapt, the outermost first."""
    names = []
    while isinstance(module, MapParameterLayer):
        names.append(module.name)
        module = module.base_layer
    return names


def _innermost(module: nn.Module) -> nn.Module:
    while isinstance(module, MapParameterLayer):
        module = module._modules["base_layer"]  # pyright: ignore[reportAssignmentType]
    return module
