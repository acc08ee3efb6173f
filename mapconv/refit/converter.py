"""Convert one placed module into MAP form: exactly where its own factors serve, to the optimum where they do not.

LoRA is exact: its factors are kept and the scalars follow from norms. DoRA is solved to the optimum
(``mapconv.algebra`` section 4), or kept in its own factors with the direction ``dora``. ε is measured on the factors as
they will be written.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from mapconv.adapter import TensorRef
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
    row_squares,
    squared_norm,
)
from mapconv.checkpoint.reader import TensorReader
from mapconv.placement.factors import FactorLoader, Factors
from mapconv.placement.tuned import TunedWeights
from mapconv.placement.weights import PlacedModule, read_weight
from mapconv.refit.converted import Converted, converted_module, finite_base, refitted_module
from mapconv.refit.norms import BaseNorms
from mapconv.refit.plan import UpgradePlan, row_scales
from mapconv.refit.products import approximate_product
from mapconv.refit.rows_direction import directed_module
from mapconv.refit.solving import Wanted, rounded
from mapconv.refit.targets.adapted import target_of
from mapconv.refit.targets.base import DenseTarget
from mapconv.refit.targets.tuned import tuned_target
from mapconv.runtime.devices import resolve_device

#: Before its first step a DoRA's magnitudes are the base's row norms, but for float32 rounding in sums over a row.
UNTRAINED = 1e-6


class Converter:
    """Turns placed modules into MAP form, one at a time; safe to call from several threads."""

    def __init__(self, reader: TensorReader, plan: UpgradePlan, norms: BaseNorms) -> None:
        self._reader, self._plan, self._options, self._norms = reader, plan, plan.options, norms
        self._device = resolve_device(plan.options.device)
        self._factors, self._tuned = FactorLoader(reader), TunedWeights(plan.placed.modules, reader)
        self._local = threading.local()

    def convert_all(self, items: Sequence[PlacedModule], root: InputRoot | None = None) -> list[Converted]:
        """Modules in MAP form, their factors read together; refits weigh errors by ``root``, as ``convert`` does."""
        if any(item.module.method is not None for item in items):
            return [self._of_method(item, root) for item in items]
        if any(self._plan.kind_of(item) == "refit" for item in items):
            return [self.convert(item, root) for item in items]
        pairs = zip(items, self._factors.load_all(items), strict=True)
        return [self._keep(item, factors, root) for item, factors in pairs]

    def convert(self, placed: PlacedModule, root: InputRoot | None = None) -> Converted:
        """One module in MAP form; an approximation weighs errors by ``root``, the root of its inputs' second moment."""
        if self._plan.kind_of(placed) == "refit":
            return self._ranked(self._refit(placed, root))
        return self._keep(placed, self._factors.load(placed), root)

    def _keep(self, placed: PlacedModule, factors: Factors, root: InputRoot | None) -> Converted:
        ways = {
            "keep-lora": self._keep_lora,
            "keep-dora": self._keep_dora,
            "keep-map": self._keep_map,
            "resize": partial(self._resize, root=root),
        }
        return self._ranked(ways[self._plan.kind_of(placed)](placed, factors))

    def _ranked(self, converted: Converted) -> Converted:
        at_most = self._options.rank_at_most
        return converted if at_most is None else converted.with_rank(at_most)

    def _resize(self, placed: PlacedModule, factors: Factors, root: InputRoot | None) -> Converted:
        """The best approximation of s·BA, which stays a plain LoRA: no weight is read, and no matrix formed."""
        wanted = self._wanted(placed)
        root = None if root is None else root.to(factors.A.device)
        made = approximate_product(factors.B.double() * placed.scaling, factors.A, wanted, root=root)
        A, B = made.A, made.B
        base = finite_base(self._norms[placed.weight], placed)
        norm, errors = product_norm(B, A), (made.error, made.output_error)
        converted = converted_module(placed, "low-rank", 1.0, base, norm, errors[0], A, B, None, errors[1])
        rank = min(wanted.rank, *placed.weight.shape)
        return converted if wanted.tolerance is not None else converted.with_rank(rank)

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

    def _keep_rows(self, placed: PlacedModule, scales: TensorRef) -> Converted:
        """diag(l)·W0 is a DoRA with B = 0 and the magnitudes l·‖W0‖_row, exactly."""
        base = self._base_matrix(placed)
        target, bias = tuned_target(placed, base, self._tuned)
        found, dtype = finite_base(matrix_fingerprint(base), placed), self._options.stored_dtype(placed)
        A, B = torch.zeros(1, base.shape[1], dtype=dtype), torch.zeros(base.shape[0], 1, dtype=dtype)
        magnitude = (self._reader.read(scales).double().view(-1) * row_squares(base).sqrt()).float()
        update_square, error_square = 0.0, 0.0
        for start, stop in row_blocks(*placed.weight.shape):
            change, rows = target.S[start:stop].double(), base[start:stop].double()
            got = merge_rows_(rows.clone(), A.double(), B[start:stop].double(), magnitude=magnitude[start:stop])
            update_square += squared_norm(got - rows)
            error_square += squared_norm(got - rows - change)
        error = (error_square / update_square) ** 0.5 if update_square else 0.0
        made = converted_module(placed, "dora", 1.0, found, update_square**0.5, error, A, B, magnitude)
        return made if bias is None else replace(made, bias=bias)

    def _keep_map(self, placed: PlacedModule, factors: Factors) -> Converted:
        """a·W0 + b·BA is stored as a·(W0 + D): B times b/a (``mapconv.algebra`` section 6)."""
        assert placed.scalars is not None  # a MAP source's
        a, b = placed.scalars.base_gain, placed.scalars.update_gain
        A, B = self._stored(factors.A, placed), self._stored(factors.B.double() * (b / a), placed)
        base = self._base_matrix(placed)
        magnitude = torch.empty(len(base), dtype=torch.float64)
        update_square, error_square = 0.0, 0.0
        for start, stop in row_blocks(*placed.weight.shape):
            rows = base[start:stop].double()
            wanted = merge_rows_(
                rows.clone(), factors.A.double(), factors.B[start:stop].double(), base_gain=a, update_gain=b
            )
            got = merge_rows_(rows.clone(), A.double(), B[start:stop].double(), base_gain=a, update_gain=a)
            magnitude[start:stop] = torch.linalg.vector_norm(got, dim=1) * math.copysign(1.0, a)
            update_square += squared_norm(wanted - rows)
            error_square += squared_norm(wanted - got)
        error = (error_square / update_square) ** 0.5 if update_square else 0.0
        found = finite_base(matrix_fingerprint(base), placed)
        return converted_module(placed, "low-rank", a, found, product_norm(B, A), error, A, B, magnitude)

    def _refit(self, placed: PlacedModule, root: InputRoot | None) -> Converted:
        """The optimum of section 4; ε and the magnitude are then measured on the factors as stored."""
        base = self._base_matrix(placed).to(self._device)
        increment, magnitude = self._factors.increment(placed)
        gain = placed.scaling if placed.scalars is None else placed.scalars.update_gain
        target = target_of(placed, increment.scaled(gain), magnitude, base)
        found = finite_base(matrix_fingerprint(base), placed)
        if (
            isinstance(target, AdaptedWeight)
            and isinstance(increment, ProductIncrement)
            and not increment.B.any()
            and target.update_norm <= UNTRAINED * found.norm
        ):
            return self._keep_base(placed, increment, target, found)
        return refitted_module(placed, target, self._wanted(placed), found, root)

    def _of_method(self, placed: PlacedModule, root: InputRoot | None) -> Converted:
        """A layer of another method than LoRA."""
        scales = row_scales(placed) if self._plan.kind_of(placed) == "keep-rows" else None
        return self._refit_tuned(placed, root) if scales is None else self._keep_rows(placed, scales)

    def _refit_tuned(self, placed: PlacedModule, root: InputRoot | None) -> Converted:
        """The closest MAP weight to what another method than LoRA merges to."""
        base = self._base_matrix(placed)
        found = finite_base(matrix_fingerprint(base), placed)
        target, bias = tuned_target(placed, base, self._tuned)
        if self._device.type != "cpu":
            target = DenseTarget(target.S.to(self._device), target.base.to(self._device))
        if self._options.direction == "dora":
            result = directed_module(placed, target, self._wanted(placed), found, root)
        else:
            result = refitted_module(placed, target, self._wanted(placed), found, root)
        return result if bias is None else replace(result, bias=bias)

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
            options.rank_of(placed),
            options.tolerance,
            options.max_rank,
            # PEFT has no DoRA for a stack of experts, so theirs is the closest plain LoRA; and an update whose rank is
            # low needs no other gain to be exact.
            1.0 if options.lora_compatible or placed.experts > 1 or self._is_low_rank(placed) else None,
            options.stored_dtype(placed),
        )

    def _is_low_rank(self, placed: PlacedModule) -> bool:
        """Whether another method than LoRA makes an update whose rank is that of the result, on the base as it is."""
        options, module = self._options, placed.module
        if module.method is None or module.map_scalars or module.is_dense or options.tolerance is not None:
            return False
        return placed.rank <= (options.rank or placed.rank)

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
