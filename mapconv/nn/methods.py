"""MAP on other methods: Δ is the update of any layer of stock PEFT's whose merge adds one (LoHa, LoKr, AdaLoRA, …).

``W' = α·W0/‖W0‖ + β·Δ/‖Δ‖`` is formed whole in each forward pass, as such a layer of PEFT's forms Δ.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from mapconv.errors import UnsupportedError, is_out_of_memory
from mapconv.formats.methods import METHODS, NO_FIXED_WEIGHT
from mapconv.nn.bases import weight_of
from mapconv.nn.updates import Units, Update
from mapconv.runtime.models import quiet_libraries
from mapconv.tuners.injection import ADAPTER, inject

#: Two float32 ways of forming one update agree to this share of it.
_SAME = 1e-4


class PeftMethod:
    """One adapter of PEFT's on layers of a live model, which are not changed: PEFT wraps them in a model of its own.

    Args:
        config: PEFT's configuration of the method; which layers it names does not count.
        layers: the model's own layers by path.

    Raises:
        UnsupportedError: a method whose layers do not add an update to the weight.
    """

    def __init__(self, config: Any, layers: Mapping[str, nn.Module]) -> None:
        self.kind = str(getattr(config.peft_type, "value", config.peft_type)).upper()
        facts = METHODS.get(self.kind)
        if facts is None or facts.changes_bias or facts.reads_base:
            reason = NO_FIXED_WEIGHT.get(self.kind, "its layers are more than a weight and an update of it")
            raise UnsupportedError(f"MAP cannot take its direction from {self.kind}: {reason}.")
        self.name, self.config = facts.name, copy.deepcopy(config)
        self.config.target_modules, self.config.exclude_modules = set(layers), None
        trained = {parameter: parameter.requires_grad for layer in layers.values() for parameter in layer.parameters()}
        with quiet_libraries():
            self.model = inject(layers, self.config)
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
        modules = dict(self.model.base_model.model.named_modules())
        self.layers: dict[str, Any] = {path: modules[path] for path in layers}
        for layer in self.layers.values():
            # The base stays the model's: here it is looked up, not held.
            vars(layer)["base_layer"] = layer._modules.pop("base_layer")
        _require_addition(next(iter(self.layers.values())), self.name)

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that PEFT saves, by its keys."""
        from peft import get_peft_model_state_dict

        with quiet_libraries():
            return get_peft_model_state_dict(self.model, adapter_name=ADAPTER, save_embedding_layers=False)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        from peft import set_peft_model_state_dict

        with quiet_libraries():
            set_peft_model_state_dict(self.model, dict(tensors), adapter_name=ADAPTER)


class MethodUpdate(Update):
    """The update of one layer of ``PeftMethod``, with α and β in units of ‖W0‖."""

    direction = None

    def __init__(
        self,
        method: PeftMethod,
        path: str,
        *,
        relative_alpha: float,
        relative_beta: float,
        base_norm: float,
        floor: float,
        units: Units = "relative",
    ) -> None:
        nn.Module.__init__(self)
        self.layer = method.layers[path]
        self._names = [name for name, parameter in self.layer.named_parameters() if parameter.requires_grad]
        self._start(relative_alpha, relative_beta, like=self.factors[0], base_norm=base_norm, floor=floor, units=units)

    @property
    def rank(self) -> int:
        return 0

    @property
    def factors(self) -> list[nn.Parameter]:
        return [self.layer.get_parameter(name) for name in self._names]

    def delta(self) -> torch.Tensor:
        """Δ, in the shape of the layer's weight."""
        return self.layer.get_delta_weight(ADAPTER)

    def restart(self, relative_alpha: float, relative_beta: float) -> None:
        """Give the scalars other values, as those to start from."""
        self._set("alpha", relative_alpha)
        self._set("beta", relative_beta)

    @torch.no_grad()
    def length(self) -> float:
        """‖Δ‖."""
        return float(self.delta().double().norm())

    @property
    def is_unscaled(self) -> bool:
        """Whether b is 1 but for rounding, so that Δ is the update itself."""
        return abs(float(self.gains()[1].detach()) - 1.0) <= 2 * torch.finfo(self.scalar("beta").dtype).eps

    def gains(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.base_gain(), self._gain(self.delta())

    def _gain(self, delta: torch.Tensor) -> torch.Tensor:
        square = delta.square().sum(dtype=torch.float64)
        # Where the floor stands for the norm, and for a Δ of 0, no gradient flows through it.
        counts = square > self.floor**2
        inverse = torch.where(counts, square, 1.0).rsqrt()
        inverse = torch.where(counts, inverse, 1 / self.floor if self.floor else 0.0)
        beta = self.scalar("beta")
        return (beta.reshape(()) * (self._unit * inverse)).to(beta.dtype)

    def merged(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W', in ``dtype`` (None: that of ``weight``)."""
        delta = self.delta()
        wide = torch.promote_types(weight.dtype, delta.dtype)
        merged = self.base_gain() * weight.to(wide) + self._gain(delta) * delta
        return merged.to(dtype or weight.dtype)

    def run(self, base_layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight = weight_of(base_layer).detach()
        with torch.autocast(weight.device.type, enabled=False):
            merged = self.merged(weight)
        return functional_call(base_layer, {"weight": merged}, (x,), tie_weights=False)


def _require_addition(layer: Any, name: str) -> None:
    """Refuse a layer whose merged weight is not its base plus what it calls its delta.

    Raises:
        UnsupportedError: a method that turns or scales the weight instead.
    """
    probe = copy.deepcopy(layer, {id(layer.base_layer): copy.deepcopy(layer.base_layer)})
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad(), quiet_libraries():
            for parameter in probe.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter))
            before, delta = probe.base_layer.weight.clone(), probe.get_delta_weight(ADAPTER)
            probe.merge(adapter_names=[ADAPTER])
            change = probe.base_layer.weight - before
            adds = delta.shape == before.shape and float((change - delta).norm()) <= _SAME * float(
                delta.norm() + before.norm()
            )
    except (AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
        # A layer that cannot be asked for an update adds none; a full memory says nothing of the method.
        if is_out_of_memory(error):
            raise
        raise UnsupportedError(_adds_nothing(name)) from error
    if not adds:
        raise UnsupportedError(_adds_nothing(name))


def _adds_nothing(name: str) -> str:
    return f"MAP cannot take its direction from {name}: its layers do not add an update to the weight."
