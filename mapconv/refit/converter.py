"""Convert one placed module into MAP form: exactly where its own factors serve, to the optimum where they do not.

LoRA is exact: its factors are kept and the scalars follow from norms. DoRA is solved to the optimum
(``mapconv.algebra`` section 4), or kept in its own factors with the direction ``dora``. ε is measured on the factors as
they will be written.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch

from mapconv.algebra.dora import AdaptedWeight, merge_rows_
from mapconv.algebra.fingerprint import (
    Fingerprint,
    block_fingerprint,
    column_numbers,
    matrix_fingerprint,
    row_numbers,
)
from mapconv.algebra.increments import ProductIncrement
from mapconv.algebra.moments import InputRoot
from mapconv.algebra.norms import (
    product_difference_norm,
    product_norm,
    row_blocks,
    squared_norm,
)
from mapconv.checkpoint.reader import TensorReader
from mapconv.placement.factors import FactorLoader, Factors
from mapconv.placement.weights import PlacedModule, read_weight
from mapconv.refit.converted import Converted, converted_module, finite_base, refitted_module
from mapconv.refit.norms import BaseNorms
from mapconv.refit.plan import UpgradePlan
from mapconv.refit.solving import Wanted, rounded
from mapconv.refit.targets.adapted import target_of
from mapconv.runtime.devices import resolve_device

#: Before its first step a DoRA's magnitudes are the base's row norms, but for float32 rounding in sums over a row.
UNTRAINED = 1e-6


class Converter:
    """Turns placed modules into MAP form, one at a time; safe to call from several threads."""

    def __init__(self, reader: TensorReader, plan: UpgradePlan, norms: BaseNorms) -> None:
        self._reader, self._plan, self._options, self._norms = reader, plan, plan.options, norms
        self._device = resolve_device(plan.options.device)
        self._factors = FactorLoader(reader)
        self._local = threading.local()

    def convert_all(self, items: Sequence[PlacedModule], root: InputRoot | None = None) -> list[Converted]:
        """Modules in MAP form, their factors read together; refits weigh errors by ``root``, as ``convert`` does."""
        if any(self._plan.kind_of(item) == "refit" for item in items):
            return [self.convert(item, root) for item in items]
        pairs = zip(items, self._factors.load_all(items), strict=True)
        return [self._keep(item, factors) for item, factors in pairs]

    def convert(self, placed: PlacedModule, root: InputRoot | None = None) -> Converted:
        """One module in MAP form; a refit weighs errors by ``root``, the root of its inputs' second moment."""
        if self._plan.kind_of(placed) == "refit":
            return self._refit(placed, root)
        return self._keep(placed, self._factors.load(placed))

    def _keep(self, placed: PlacedModule, factors: Factors) -> Converted:
        kept = self._keep_lora if self._plan.kind_of(placed) == "keep-lora" else self._keep_dora
        return kept(placed, factors)

    def _keep_lora(self, placed: PlacedModule, factors: Factors) -> Converted:
        """W0 + s·BA is MAP already: α = ‖W0‖, β = ‖s·BA‖ (``mapconv.algebra`` section 2)."""
        scaling, wide = placed.scaling, self._options.stored_dtype(placed) == torch.float32
        A = factors.A if wide else self._stored(factors.A, placed)
        B = self._stored(factors.B * scaling, placed)
        base = finite_base(self._norms[placed.weight], placed)
        norm, error = product_norm(B, A), 0.0
        if not (wide and _loses_nothing(scaling)):
            wanted = factors.B.double() * scaling
            # Often no bit is lost here either, which is cheaper to see than to measure.
            if not (torch.equal(A.to(factors.A.dtype), factors.A) and torch.equal(B.double(), wanted)):
                source_norm = abs(scaling) * product_norm(factors.B, factors.A)
                difference = product_difference_norm(wanted, factors.A, B, A)
                error = difference / source_norm if source_norm else 0.0
        return converted_module(placed, "low-rank", 1.0, base, norm, error, A, B, None)

    def _keep_dora(self, placed: PlacedModule, factors: Factors) -> Converted:
        """T is kept in DoRA's own factors, with Δ = T − W0 and a = b = 1 (``mapconv.algebra`` section 5)."""
        assert factors.magnitude is not None  # a DoRA's
        scaled = factors.B.double() * placed.scaling
        A, B = self._stored(factors.A, placed), self._stored(factors.B * placed.scaling, placed)
        base = self._base_matrix(placed)
        left, right = row_numbers(base.shape[0]), column_numbers(base.shape[1])
        found, update_square, error_square = Fingerprint(), 0.0, 0.0
        for start, stop in row_blocks(*placed.weight.shape):
            rows = base[start:stop].double()
            magnitude = factors.magnitude[start:stop]
            wanted = merge_rows_(rows.clone(), factors.A.double(), scaled[start:stop], magnitude=magnitude)
            got = merge_rows_(rows.clone(), A.double(), B[start:stop].double(), magnitude=magnitude)
            found += block_fingerprint(rows, left[start:stop], right)
            update_square += squared_norm(got - rows)
            error_square += squared_norm(wanted - got)
        norm = update_square**0.5
        error = (error_square / update_square) ** 0.5 if update_square else 0.0
        return converted_module(placed, "dora", 1.0, finite_base(found, placed), norm, error, A, B, factors.magnitude)

    def _refit(self, placed: PlacedModule, root: InputRoot | None) -> Converted:
        """The optimum of section 4; ε and the magnitude are then measured on the factors as stored."""
        base = self._base_matrix(placed).to(self._device)
        increment, magnitude = self._factors.increment(placed)
        target = target_of(placed, increment.scaled(placed.scaling), magnitude, base)
        found = finite_base(matrix_fingerprint(base), placed)
        if (
            isinstance(target, AdaptedWeight)
            and isinstance(increment, ProductIncrement)
            and not increment.B.any()
            and target.update_norm <= UNTRAINED * found.norm
        ):
            return self._keep_base(placed, increment, target, found)
        return refitted_module(placed, target, self._wanted(placed), found, root)

    def _keep_base(
        self, placed: PlacedModule, factors: ProductIncrement, target: AdaptedWeight, base: Fingerprint
    ) -> Converted:
        """An untrained DoRA has no direction: what its magnitudes' rounding does to W0 is noise, and not refitted."""
        rank = min(self._options.rank or placed.rank, factors.A.shape[0])
        A, B = self._stored(factors.A[:rank], placed), self._stored(factors.B[:, :rank], placed)
        magnitude = target.approximation_row_norms(factors.B.to(self._device), factors.A.to(self._device))
        return converted_module(placed, "low-rank", 1.0, base, 0.0, 0.0, A, B, magnitude)

    def _wanted(self, placed: PlacedModule) -> Wanted:
        options = self._options
        return Wanted(
            placed.module.path,
            options.rank or placed.effective_rank,
            options.tolerance,
            options.max_rank,
            # PEFT has no DoRA for a stack of experts, so theirs is the closest plain LoRA.
            1.0 if options.lora_compatible or placed.experts > 1 else None,
            options.stored_dtype(placed),
        )

    def _stored(self, factor: torch.Tensor, placed: PlacedModule) -> torch.Tensor:
        return rounded(factor, self._options.stored_dtype(placed), placed.module.path)

    def _base_matrix(self, placed: PlacedModule) -> torch.Tensor:
        """W0 in float32, in memory that this thread uses again for its next module."""
        matrix = getattr(self._local, "matrix", None)
        if matrix is None or matrix.numel() < placed.weight.numel:
            matrix = self._local.matrix = torch.empty(placed.weight.numel)
        return read_weight(placed.weight, self._reader, matrix)


def _loses_nothing(scaling: float) -> bool:
    """Whether float32 values times ``scaling`` are exact, unless they overflow: a power of two, and no small one."""
    return scaling >= 1 and math.frexp(scaling)[0] == 0.5
