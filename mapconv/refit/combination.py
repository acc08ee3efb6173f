"""Several adapters' effects on each weight, as one module in MAP form: exactly, or to the optimum of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mapconv.adapter import Direction
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.algebra.mixing import Method, random_key
from mapconv.algebra.moments import InputRoot, Statistics
from mapconv.algebra.norms import product_norm
from mapconv.checkpoint.reader import TORCH_DTYPES, TensorReader
from mapconv.errors import BaseMismatchError
from mapconv.placement.base_check import base_fault
from mapconv.placement.factors import FactorLoader
from mapconv.placement.union import Shared
from mapconv.placement.weights import read_weight
from mapconv.refit.converted import Converted, converted_module, finite_base, refitted_module
from mapconv.refit.norms import BaseNorms
from mapconv.refit.plan import Dtype
from mapconv.refit.products import approximate_product
from mapconv.refit.rows_direction import directed_module
from mapconv.refit.solving import Refitted, Wanted
from mapconv.refit.targets.mixed import MixedTarget, dense_bytes
from mapconv.refit.targets.sums import Effect, SumTarget, effect_of, needs_base, weighted_sum


@dataclass(frozen=True)
class CombineOptions:
    """What the caller asked for; ``rank`` and ``tolerance`` None keep all of a sum of LoRAs.

    ``weights`` has one for each adapter. ``density`` and ``seed`` are of the methods that leave elements out.
    """

    weights: tuple[float, ...]
    method: Method
    density: float
    seed: int
    rank: int | None
    tolerance: float | None
    max_rank: int
    direction: Direction
    lora_compatible: bool
    dtype: Dtype
    device: torch.device
    #: Of the inputs of the layers, that errors are weighed by; None: all weights alike.
    statistics: Statistics | None = None

    @property
    def keeps_all(self) -> bool:
        return self.rank is None and self.tolerance is None

    def wanted(self, weight: Shared) -> Wanted:
        first = weight.parts[0][1].module.lora_A.dtype
        dtype = TORCH_DTYPES[first] if self.dtype == "auto" else getattr(torch, self.dtype)
        gain = 1.0 if self.lora_compatible else None
        rank = self.rank or min(weight.rank, *weight.item.weight.shape)
        return Wanted(weight.item.module.path, rank, self.tolerance, self.max_rank, gain, dtype)


class Combiner:
    """Combines adapters weight by weight; safe to call from several threads.

    Args:
        reader: of the base's files.
        norms: of the base's weights; those of ``light`` weights are loaded.
        options: what is asked.
        names: of the adapters, as the user gave them.
        contents: their fingerprints, which the random choices of ``dare`` depend on: not on where they lie, nor on
            their order.
        with_magnitude: every module needs one for stock PEFT, because another one does.
        force: accept a base that a MAP adapter was not made for.
    """

    def __init__(
        self,
        reader: TensorReader,
        norms: BaseNorms,
        options: CombineOptions,
        names: Sequence[str],
        contents: Sequence[str],
        *,
        with_magnitude: bool,
        force: bool,
    ) -> None:
        self._reader, self._norms, self._options, self._names = reader, norms, options, names
        self._contents = contents
        self._factors, self._with_magnitude, self._force = FactorLoader(reader), with_magnitude, force
        #: Why the base was accepted against what an adapter records of its own.
        self.accepted: list[str] = []

    @staticmethod
    def needs_gains(options: CombineOptions, weights: Sequence[Shared]) -> bool:
        """Whether some module of the result may have another gain than 1."""
        mixed = options.method != "sum" or options.direction == "dora"
        return mixed or any(needs_base(part) for weight in weights for _, part in weight.parts)

    def combine(self, weights: Sequence[Shared], root: InputRoot | None = None) -> list[Converted]:
        """Modules in MAP form: one weight, or the experts of a stack, whose factors get one rank.

        Errors are weighed by ``root``, the root of the inputs' second moment.
        """
        made = [self._combine(weight, root) for weight in weights]
        rank = max(len(item.A) for item in made)
        return [item.with_rank(rank) for item in made]

    def _combine(self, weight: Shared, root: InputRoot | None) -> Converted:
        item, options = weight.item, self._options
        base = None
        if self.reads_base(weight):
            base = read_weight(item.weight, self._reader, torch.empty(item.weight.numel))
        found = finite_base(self._norms[item.weight], item)
        self._check(weight, found)
        effects, shares = self._effects(weight, base)
        wanted = options.wanted(weight)
        if options.method == "sum" and options.direction == "low-rank":
            total = weighted_sum(effects, shares)
            factor = _common(total)
            gain = 1.0 + factor if factor is not None else 0.0
            if total.excess is None or (options.keeps_all and factor is not None and wanted.gain is None and gain):
                return self._thin(weight, total, gain, wanted, found, base, root)
        assert base is not None  # whatever is not thin reads it
        target = self._target(weight, base, effects, shares)
        if options.direction == "dora":
            return directed_module(item, target, wanted, found, root)
        solved = target if options.device.type == "cpu" else target.dense(options.device)
        return refitted_module(item, solved, wanted, found, root)

    def target(self, weight: Shared) -> SumTarget | MixedTarget:
        """What a result comes close to: T of one weight, with W0 read for it."""
        base = read_weight(weight.item.weight, self._reader, torch.empty(weight.item.weight.numel))
        return self._target(weight, base, *self._effects(weight, base))

    def _effects(self, weight: Shared, base: torch.Tensor | None) -> tuple[list[Effect], list[float]]:
        """What each adapter does to a weight, and what it is multiplied by."""
        parts = [part for _, part in weight.parts]
        loaded = zip(parts, map(self._factors.load, parts), strict=True)
        shares = [self._options.weights[number] for number, _ in weight.parts]
        return [effect_of(part, factors, base) for part, factors in loaded], shares

    def _target(
        self, weight: Shared, base: torch.Tensor, effects: Sequence[Effect], shares: Sequence[float]
    ) -> SumTarget | MixedTarget:
        options = self._options
        if options.method == "sum":
            return SumTarget(base, weighted_sum(effects, shares))
        keys = [random_key(options.seed, self._contents[n], str(weight.item.key)) for n, _ in weight.parts]
        return MixedTarget(base, effects, shares, options.method, options.density, keys)

    def _thin(
        self,
        weight: Shared,
        total: Effect,
        gain: float,
        wanted: Wanted,
        found: Fingerprint,
        base: torch.Tensor | None,
        root: InputRoot | None,
    ) -> Converted:
        """A sum that is gain·(W0 + BA) already: its factors side by side, or the best approximation of BA."""
        whole = self._options.keeps_all
        refitted: Refitted = approximate_product(total.B / gain, total.A, wanted, whole=whole, root=root)
        A, B = refitted.A, refitted.B
        magnitude = None
        if base is not None:
            magnitude = gain * SumTarget(base, Effect(None, B.double(), A.float())).approximation_row_norms(
                B.float(), A.float()
            )
        norm, errors = product_norm(B, A), (refitted.error, refitted.output_error)
        return converted_module(weight.item, "low-rank", gain, found, norm, errors[0], A, B, magnitude, errors[1])

    def reads_base(self, weight: Shared) -> bool:
        """Whether the weight's values are read, rather than its norm alone."""
        options = self._options
        thin = options.method == "sum" and options.direction == "low-rank"
        return not thin or self._with_magnitude or any(needs_base(part) for _, part in weight.parts)

    def work(self, weight: Shared) -> int:
        """Bytes of memory that one weight takes."""
        shape, rank = weight.item.weight.shape, weight.rank
        thin = 16 * rank * sum(shape)
        if not self.reads_base(weight):
            return thin
        mixed = 0 if self._options.method == "sum" else dense_bytes(shape, len(weight.parts))
        directed = 4 * weight.item.weight.numel if self._options.direction == "dora" else 0
        seen = 0 if self._options.statistics is None else 16 * weight.item.weight.numel
        return thin + 4 * weight.item.weight.numel + mixed + directed + seen

    def _check(self, weight: Shared, found: Fingerprint) -> None:
        """Hold the base to what MAP adapters record of theirs.

        Raises:
            BaseMismatchError: an adapter was made for another base.
        """
        for number, part in weight.parts:
            fault = None if part.scalars is None else base_fault(part.scalars, found)
            if fault is not None and self._force:
                self.accepted.append(f"{part.weight.name} {fault} ({self._names[number]})")
            elif fault is not None:
                raise BaseMismatchError(
                    f"{part.weight.pieces[0].tensor.file}: {part.weight.name} {fault} ({self._names[number]}): combine "
                    "adapters of one base, or accept this one with --force."
                )


def _common(effect: Effect) -> float | None:
    """The factor of W0 in an effect that is the same for all rows; None where there is none."""
    if effect.excess is None:
        return 0.0
    first = float(effect.excess[0])
    return first if bool((effect.excess == first).all()) else None
