"""The trainable part of one weight in MAP form: factors and two scalars, in float32 whatever the model's dtype.

Adam moves a parameter by about its learning rate whatever the parameter's unit, so one learning rate serves factors and
scalars only if the scalars are of the size of 1. They are held relative to a norm:

- ``relative_alpha`` = α/‖W0‖, which is the gain a itself (1 for a LoRA);
- ``relative_beta`` = β/‖W0‖ for the direction ``low-rank``, so that b = relative_beta·‖W0‖/‖BA‖: equal steps of the two
  scalars move the weight equally far;
- ``relative_beta`` = β/‖Δ‖ = b for the direction ``dora``: there ‖Δ‖ = ‖T − W0‖ starts at 0 in a fresh adapter, and
  following it in training would take a pass over the weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mapconv.adapter import Direction, MapModule, Module
from mapconv.algebra.dora import merge_rows_
from mapconv.algebra.norms import product_norm, row_blocks, squared_norm
from mapconv.nn.bases import merged_row_norms, row_squares, values_of
from mapconv.nn.functions import UpdateGain, gram_dtype, inverse_norm


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
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(A, requires_grad=False)
        self.B = nn.Parameter(B, requires_grad=False)
        self._start(relative_alpha, relative_beta, like=A, base_norm=base_norm, floor=floor)
        self.detach_norm = detach_norm

    def _start(self, alpha: float, beta: float, *, like: torch.Tensor, base_norm: float, floor: float) -> None:
        """Set what every update has besides its factors."""
        self.relative_alpha = _scalars([alpha], like)
        self.relative_beta = _scalars([beta], like)
        self.base_norm = base_norm
        self.base_projection: float | None = None
        self.detach_norm = False
        self.floor = floor
        self.origin: Origin | None = None
        self._exact = {"relative_alpha": [alpha], "relative_beta": [beta]}
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
        return [self.relative_alpha, self.relative_beta]

    def hold_gain(self) -> None:
        """Keep α as it is in training."""
        self.relative_alpha.requires_grad_(False)

    def gains(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, b) as 0-d tensors that gradients flow through; ‖BA‖ is kept while the factors are frozen."""
        return self.relative_alpha.reshape(()), self.update_gain()

    def update_gain(self) -> torch.Tensor:
        """b = β/‖BA‖."""
        beta = self.relative_beta
        if self._is_training():
            self._cache = None
            factors = [factor.detach() if self.detach_norm else factor for factor in self.factors]
            return UpdateGain.apply(beta, *factors, self._unit_norm, gram_dtype(self.A), self.floor)
        if self._is_stale():
            with _lasting():
                self._keep(self._unit_norm * inverse_norm(self.A, self.B, floor=self.floor)[0])
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

    def _is_training(self) -> bool:
        return any(factor.requires_grad for factor in self.factors)

    @property
    def _unit_norm(self) -> Any:
        """The unit of the scalars; a weight of zeros has none, and takes 1."""
        return self.base_norm or 1.0

    # Absolute values, for reading

    def exact(self, name: str) -> float:
        """A scalar in float64: as it was given where the parameter still rounds to the same value."""
        return self.all_exact(name)[0]

    def all_exact(self, name: str) -> list[float]:
        """``exact`` of every weight of the update."""
        return [
            given if value in (given, float(torch.tensor(given, dtype=torch.float32))) else value
            for value, given in zip(getattr(self, name).tolist(), self._exact[name], strict=True)
        ]

    def alpha(self) -> float:
        if self.origin and self.origin.scalars and self._is_as_given("relative_alpha"):
            return self.origin.scalars[0].alpha
        return self.exact("relative_alpha") * self.base_norm

    def beta(self, base: nn.Module, path: str) -> float:
        if self.origin and self.origin.scalars and self._is_as_given("relative_beta"):
            return self.origin.scalars[0].beta
        return self.exact("relative_beta") * self._unit_norm

    def sizes(self, base: nn.Module, path: str) -> list[float]:
        """‖W' − a·W0‖/‖W0‖ of every weight of the update."""
        return [abs(beta) * self.share() for beta in self.relative_beta.tolist()]

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


class DoraUpdate(Update):
    """``W' = (a − b)·W0 + b·diag(d)(W0 + BA)`` with d = magnitude ⊘ ‖W0 + BA‖_row (``mapconv.algebra`` section 5).

    The row norms are computed once while A and B are frozen, and anew in each forward pass while they train; no
    gradient flows through them, as in DoRA.
    """

    direction: Direction = "dora"

    def __init__(self, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor, **settings: Any) -> None:
        super().__init__(A, B, **settings)
        self.magnitude = nn.Parameter(magnitude, requires_grad=False)
        self._base_squares: torch.Tensor | None = None

    @property
    def factors(self) -> list[nn.Parameter]:
        return [self.A, self.B, self.magnitude]

    def gains(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.relative_alpha.reshape(()), self.relative_beta.reshape(())

    def scales(self, base: nn.Module, path: str) -> torch.Tensor:
        """d, (out,), in the parameters' dtype; 0 for a row of zeros, as row_scales has it."""
        if self._is_training() or self._is_stale():
            # A frozen direction is exact; one in training can do with float32 products.
            dtype = torch.promote_types(self.A.dtype, torch.float32) if self._is_training() else torch.float64
            with _lasting():
                norms = self.row_norms(base, path, dtype)
                inverse = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
            self._keep(inverse)
        assert self._cache is not None  # or it would be stale
        return (self.magnitude * self._cache).to(self.magnitude.dtype)

    def row_norms(self, base: nn.Module, path: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        with values_of(base, path) as weight:
            if self._base_squares is None:
                self._base_squares = row_squares(weight)
            A, B = self.A.to(weight.device), self.B.to(weight.device)
            norms = merged_row_norms(weight, A, B, base_squares=self._base_squares, dtype=dtype)
        return norms.to(self.A.device)

    def beta(self, base: nn.Module, path: str) -> float:
        gain = self.exact("relative_beta")
        if self.origin and self.origin.scalars and self.is_as_loaded:
            return self.origin.scalars[0].beta
        with values_of(base, path) as weight:
            A, B, magnitude = (factor.detach().to(weight.device) for factor in self.factors)
            return gain * direction_norm(weight, A, B, magnitude)

    def sizes(self, base: nn.Module, path: str) -> list[float]:
        return [abs(self.beta(base, path)) / (self.base_norm or 1.0)]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self._base_squares = None
        return super()._apply(fn, recurse)


@contextmanager
def _lasting() -> Iterator[None]:
    """For what is kept from one pass to the next: no graph, and no inference tensor, which cannot train later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def direction_norm(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor) -> float:
    """‖T − W0‖ of a DoRA, row block by row block in float64; W0 (out, in) of any strides."""
    total = 0.0
    for start, stop in row_blocks(*weight.shape):
        rows = weight[start:stop].double()
        merged = merge_rows_(rows.clone(), A.double(), B[start:stop].double(), magnitude=magnitude[start:stop])
        total += squared_norm(merged.sub_(rows))
    return total**0.5


def _scalars(values: Sequence[float], like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=like.dtype, device=like.device), requires_grad=False)
