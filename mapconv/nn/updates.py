"""The trainable part of one weight in MAP form: factors and two scalars, in float32 whatever the model's dtype.

Adam moves a parameter by about its learning rate whatever the parameter's unit, so one learning rate serves factors and
scalars only if the scalars are of the size of 1. They are held relative to a norm:

- ``relative_alpha`` = α/‖W0‖, which is the gain a itself (1 for a LoRA);
- ``relative_beta`` = β/‖W0‖ for the direction ``low-rank``, so that b = relative_beta·‖W0‖/‖BA‖: equal steps of the two
  scalars move the weight equally far;
- ``relative_beta`` = β/‖Δ‖ = b for the direction ``dora``: there ‖Δ‖ = ‖T − W0‖ starts at 0 in a fresh adapter, and
  following it in training would take a pass over the weight.

``absolute_alpha`` and ``absolute_beta`` are α and β themselves, as the method's authors train them: a step of Adam's
then moves a weight by the learning rate, whatever ‖W0‖ is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mapconv.adapter import Direction, MapModule, Module
from mapconv.algebra.norms import product_norm
from mapconv.nn.functions import UpdateGain, gram_dtype, inverse_norm

#: What the scalars are held in: norms, as above, or the unit of the weights.
Units = Literal["relative", "absolute"]


@dataclass(frozen=True)
class Origin:
    """What an update was loaded from, so that an unchanged one is saved to the same bytes.

    ``scalars`` are the recorded ones (none but in a MAP directory), and ``base_facts`` what the file says of the base
    tensor, for each weight of the update: one, or the experts of a stack. ``dtype`` is that of the stored factors;
    ``magnitude`` is what stock PEFT needs to compute a low-rank direction with a ≠ 1.
    """

    module: Module
    scalars: tuple[MapModule, ...]
    base_facts: tuple[Mapping[str, Any], ...]
    dtype: torch.dtype
    magnitude: torch.Tensor | None
    digest: bytes


class Update(nn.Module):
    """``W' = α·W0/‖W0‖ + β·BA/max(‖BA‖, floor)`` for one weight: A (r, in), B (out, r), and the scalars, (1,) each.

    With ``floor`` > 0 an update may start at B = 0, which has no direction: below it the weight is W0 with a plain LoRA
    of gain β/floor. The scalars have one dimension because sharding (FSDP) takes no parameter without.
    """

    direction: Direction | None = "low-rank"

    def __init__(
        self,
        A: torch.Tensor,
        B: torch.Tensor,
        *,
        relative_alpha: float,
        relative_beta: float,
        base_norm: float,
        detach_norm: bool = False,
        floor: float = 0.0,
        units: Units = "relative",
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(A, requires_grad=False)
        self.B = nn.Parameter(B, requires_grad=False)
        self._start(relative_alpha, relative_beta, like=A, base_norm=base_norm, floor=floor, units=units)
        self.detach_norm = detach_norm

    def _start(
        self, alpha: float, beta: float, *, like: torch.Tensor, base_norm: float, floor: float, units: Units
    ) -> None:
        """Set what every update has besides its factors; ``alpha`` and ``beta`` are shares of ‖W0‖."""
        self.units: Units = units
        self.base_norm = base_norm
        self._exact: dict[str, list[float]] = {}
        for name, value in (("alpha", alpha), ("beta", beta)):
            self.register_parameter(f"{units}_{name}", _scalars([0.0], like))
            self._set(name, value)
        self.base_projection: float | None = None
        self.detach_norm = False
        self.floor = floor
        self.origin: Origin | None = None
        self._cache: torch.Tensor | None = None
        self._versions: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def factors(self) -> list[nn.Parameter]:
        return [self.A, self.B]

    @property
    def scalars(self) -> list[nn.Parameter]:
        return [self.scalar("alpha"), self.scalar("beta")]

    def scalar(self, name: str) -> nn.Parameter:
        """The parameter of ``alpha`` or ``beta``."""
        parameter = self._parameters[f"{self.units}_{name}"]
        assert parameter is not None  # it was registered with a value
        return parameter

    def _set(self, name: str, relative: float) -> None:
        """Give a scalar the value to start from, as a share of ‖W0‖."""
        value = relative if self.units == "relative" else relative * (self.base_norm or 1.0)
        self._exact[name] = [value]
        self.scalar(name).data.fill_(value)

    def _shares(self, values: Any) -> Any:
        """A scalar's values as shares of ‖W0‖."""
        return values if self.units == "relative" else values / (self.base_norm or 1.0)

    def hold_gain(self) -> None:
        """Keep α as it is in training."""
        self.scalar("alpha").requires_grad_(False)

    def gains(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, b) as 0-d tensors that gradients flow through; ‖BA‖ is kept while the factors are frozen."""
        return self.base_gain(), self.update_gain()

    def base_gain(self) -> torch.Tensor:
        """a = α/‖W0‖."""
        return self._shares(self.scalar("alpha")).reshape(())

    def update_gain(self) -> torch.Tensor:
        """b = β/‖BA‖."""
        beta = self.scalar("beta")
        if self.is_training():
            self._cache = None
            factors = [factor.detach() if self.detach_norm else factor for factor in self.factors]
            return UpdateGain.apply(beta, *factors, self._unit, gram_dtype(self.A), self.floor)
        if self._is_stale():
            with lasting():
                self._keep(self._unit * inverse_norm(self.A, self.B, floor=self.floor)[0])
        assert self._cache is not None  # or it would be stale
        return (beta.reshape(self._cache.shape) * self._cache).to(beta.dtype)

    def _keep(self, value: torch.Tensor) -> None:
        self._cache, self._versions = value, self._factor_versions()

    def _is_stale(self) -> bool:
        """Whether there is nothing kept, or the factors were written to since (a graph is compiled for frozen ones)."""
        return self._cache is None or not (torch.compiler.is_compiling() or self._versions == self._factor_versions())

    def _factor_versions(self) -> tuple[int, ...]:
        if torch.compiler.is_compiling():
            return ()
        return tuple(0 if factor.is_inference() else factor._version for factor in self.factors)

    def step_settings(self) -> tuple[float, float, float, bool]:
        """What one of α is worth as a, one of β as β, the floor, and whether no gradient flows through ‖BA‖."""
        self._cache = None
        return self._shares(1.0), self._unit, self.floor, self.detach_norm

    def is_training(self) -> bool:
        """Whether a factor is trained."""
        return any(factor.requires_grad for factor in self.factors)

    @property
    def _unit(self) -> Any:
        """What one of β's parameter is in the unit of the weights; a weight of zeros has no norm, and takes 1."""
        return (self.base_norm or 1.0) if self.units == "relative" else 1.0

    # Absolute values, for reading

    def exact(self, name: str) -> float:
        """A scalar as a share of ‖W0‖: the number that was given, where the parameter still rounds to it."""
        return self._shares(self.all_exact(name)[0])

    def all_exact(self, name: str) -> list[float]:
        """A scalar of every weight of the update, in the parameter's unit."""
        return [
            given if value in (given, float(torch.tensor(given, dtype=torch.float32))) else value
            for value, given in zip(self.scalar(name).tolist(), self._exact[name], strict=True)
        ]

    def alpha(self) -> float:
        if self.origin and self.origin.scalars and self._is_as_given("alpha"):
            return self.origin.scalars[0].alpha
        return self.exact("alpha") * self.base_norm

    def beta(self, base: nn.Module, path: str) -> float:
        if self.origin and self.origin.scalars and self._is_as_given("beta"):
            return self.origin.scalars[0].beta
        return self.all_exact("beta")[0] * self._unit

    def sizes(self, base: nn.Module, path: str) -> list[float]:
        """‖W' − a·W0‖/‖W0‖ of every weight of the update."""
        return [abs(self._shares(beta)) * self.share() for beta in self.scalar("beta").tolist()]

    def share(self) -> float:
        """‖Δ‖ over what stands for it: less than 1 under the floor, where β·Δ/‖Δ‖ is only so long."""
        length = self.length()
        return length / max(length, self.floor) if length else 0.0

    def length(self) -> float:
        """‖Δ‖."""
        return float(product_norm(self.B.detach(), self.A.detach()))

    def _is_as_given(self, name: str) -> bool:
        return self.all_exact(name) == self._exact[name]

    def digest(self) -> bytes:
        """What tells the factors from changed ones."""
        digest = hashlib.sha256()
        for factor in self.factors:
            digest.update(factor.detach().cpu().float().contiguous().view(torch.uint8).numpy().data)
        return digest.digest()

    @property
    def is_as_loaded(self) -> bool:
        if self.origin is None or not all(map(self._is_as_given, self._exact)):
            return False
        return self.digest() == self.origin.digest

    # What nn.Module does with parameters

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move along with the model, but never below float32."""
        self._cache = None

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < 4 <= tensor.dtype.itemsize else moved

        return super()._apply(keep, recurse)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self._cache = None
        super()._load_from_state_dict(*arguments, **keywords)


@contextmanager
def lasting() -> Iterator[None]:
    """For what is kept from one pass to the next: no graph, and no inference tensor, which cannot train later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _scalars(values: Sequence[float], like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=like.dtype, device=like.device), requires_grad=False)
