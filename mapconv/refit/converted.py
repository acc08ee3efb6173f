"""One module in MAP form as it is written, and the one way from a target to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from mapconv.adapter import Direction, MapModule
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.algebra.moments import InputRoot
from mapconv.algebra.norms import product_norm
from mapconv.errors import CheckpointError
from mapconv.placement.weights import PlacedModule
from mapconv.refit.products import padded
from mapconv.refit.solving import ModuleRefit, Wanted
from mapconv.refit.targets.base import Target


@dataclass(frozen=True)
class Converted:
    """One module in MAP form, as it is written.

    A (k, in) and B (out, k) are the factors of D = (b/a)·Δ; ``magnitude`` (out,) is what stock PEFT needs to compute
    the module as a DoRA, or None where the gain is 1 and the direction is low-rank. ``bias`` (out,) takes the place of
    the layer's own; None leaves that as it is.
    """

    scalars: MapModule
    A: torch.Tensor
    B: torch.Tensor
    magnitude: torch.Tensor | None
    bias: torch.Tensor | None = None

    def with_rank(self, rank: int) -> Converted:
        """The same with factors that zeros bring up to a rank."""
        if len(self.A) >= rank:
            return self
        A, B = padded(self.A, self.B, rank)
        return replace(self, A=A, B=B, scalars=replace(self.scalars, rank=rank))

    def without_factors(self) -> Converted:
        """The numbers alone."""
        return replace(self, A=self.A[:0], B=self.B[:, :0], magnitude=None)


def refitted_module(
    placed: PlacedModule, target: Target, wanted: Wanted, base: Fingerprint, root: InputRoot | None = None
) -> Converted:
    """The closest MAP weight to a target, with ε and the magnitude measured on the factors as stored.

    Args:
        placed: the module that it becomes.
        target: T on its base.
        wanted: rank or tolerance, gain and dtype.
        base: W0's fingerprint.
        root: P of the layer's inputs, to weigh errors by; None weighs all weights alike.

    Raises:
        OutputError: a value that overflows in the factors' dtype. FidelityError: a solution that cannot be trusted.
    """
    if root is not None:
        root = root.to(target.device)
    refitted = ModuleRefit(target, wanted, root, None if root is None else target.seen_through(root)).solve()
    A, B = refitted.A, refitted.B
    wide_A, wide_B = (factor.to(target.device, torch.float32) for factor in (A, B))
    magnitude = refitted.gain * target.approximation_row_norms(wide_B, wide_A)
    return converted_module(
        placed,
        "low-rank",
        refitted.gain,
        base,
        product_norm(B, A),
        refitted.error,
        A,
        B,
        magnitude,
        refitted.output_error,
    )


def converted_module(
    placed: PlacedModule,
    direction: Direction,
    gain: float,
    base: Fingerprint,
    direction_norm: float,
    error: float,
    A: torch.Tensor,
    B: torch.Tensor,
    magnitude: torch.Tensor | None,
    output_error: float | None = None,
) -> Converted:
    """A module's factors and scalars. The direction is stored so that b = a: what PEFT computes is a·(W0 + D)."""
    scalars = MapModule(
        path=placed.module.path,
        expert=placed.expert,
        direction=direction,
        rank=A.shape[0],
        alpha=gain * base.norm,
        beta=gain * direction_norm,
        base_norm=base.norm,
        direction_norm=direction_norm,
        error=error,
        output_error=output_error,
        base_projection=base.projection,
    )
    return Converted(scalars, A, B, None if magnitude is None else magnitude.float().cpu())


def finite_base(base: Fingerprint, placed: PlacedModule) -> Fingerprint:
    """The base's fingerprint, unless it holds NaN or infinity.

    Raises:
        CheckpointError: it does.
    """
    if not math.isfinite(base.square):
        raise CheckpointError(f"{placed.weight.pieces[0].tensor.file}: {placed.weight.name} holds NaN or infinity.")
    return base
