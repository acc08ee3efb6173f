"""Refit an adapter for another base: the update of that base's weights that comes closest to the weights as trained.

T is the source's weight on the base that it was trained on, W the weight of the base that it is to be served on. The
refit minimises the difference of the layers' outputs (``mapconv.algebra.regression``) where their inputs are known,
else that of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import pad

from mapconv.algebra.dense import dense_bytes
from mapconv.algebra.fingerprint import matrix_fingerprint
from mapconv.algebra.lowrank import is_randomized
from mapconv.algebra.norms import product_norm, row_squares, squared_norm
from mapconv.algebra.pencil import DensePencil
from mapconv.algebra.regression import RegressionInputs
from mapconv.checkpoint.reader import TORCH_DTYPES, TensorReader
from mapconv.errors import BaseMismatchError
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.base_check import base_fault
from mapconv.placement.factors import FactorLoader
from mapconv.placement.weights import PlacedModule, read_weight, subtract_weight_
from mapconv.refit.converted import Converted, converted_module, finite_base
from mapconv.refit.mixture import Run
from mapconv.refit.plan import Dtype
from mapconv.refit.ranks import Spectrum, squared_singular_values
from mapconv.refit.solving import ModuleRefit, Wanted
from mapconv.refit.stored_statistics import StoredStatistics
from mapconv.refit.targets.adapted import adapted_weight_
from mapconv.refit.targets.moved import update_of
from mapconv.runtime.threads import in_order, workers_for
from mapconv.wording import counted

#: A module, what reads what is known of its inputs, and the statistics that hold them, to check its base by.
_Job = tuple[PlacedModule, Callable[[], RegressionInputs] | None, StoredStatistics | None]
#: Of refits that run side by side.
MEMORY = 480 << 20


@dataclass(frozen=True)
class RebaseOptions:
    """What the caller asked for; ``ranks`` by module path stand before ``rank``, and None keeps the source's own.

    ``free_gain``: the other base's weight may be scaled as well; else a = 1, and the result is a plain LoRA.
    ``pad_ranks``: zeros bring every module's factors to the largest rank.
    """

    rank: int | None = None
    tolerance: float | None = None
    max_rank: int = 256
    free_gain: bool = False
    dtype: Dtype = "float32"
    pad_ranks: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)

    def stored_bytes(self, adapter: PlacedAdapter) -> int:
        """Bytes of the factors as written, about; with a tolerance, at the source's rank."""
        wanted = [(item.weight.shape, self.wanted(item)) for item in adapter.modules]
        return sum(sum(shape) * min(want.rank, *shape) * want.dtype.itemsize for shape, want in wanted)

    def wanted(self, placed: PlacedModule) -> Wanted:
        dtype = TORCH_DTYPES[placed.module.lora_A.dtype] if self.dtype == "auto" else getattr(torch, self.dtype)
        gain = None if self.free_gain and placed.experts == 1 else 1.0
        rank = self.ranks.get(placed.module.path) or self.rank or placed.effective_rank
        return Wanted(placed.module.path, rank, self.tolerance, self.max_rank, gain, dtype)


@dataclass(frozen=True)
class Rebased:
    """One module on the other base. ``changed``: ‖W − W0‖/‖W0‖ between the two bases.

    ``before`` is the error of the layer's outputs with the source's update put on the other base as it is, in the unit
    of ``scalars.output_error``; None where its inputs are not known. ``tokens`` is how many of those were seen.
    """

    placed: PlacedModule
    converted: Converted
    changed: float
    before: float | None
    tokens: int | None

    def without_factors(self) -> Rebased:
        """The numbers alone."""
        return replace(self, converted=self.converted.without_factors())


class Rebaser:
    """Refits modules one at a time, from both bases' files."""

    def __init__(self, source: PlacedAdapter, served: PlacedAdapter, options: RebaseOptions) -> None:
        """
        Args:
            source: the adapter on the base that it was trained on.
            served: the same adapter on the base that the result is for; modules of equal keys belong together.
        """
        self._trained = {item.key: item for item in source.modules}
        self._served = served
        self._options = options
        ranks = (options.wanted(item).rank for item in served.modules)
        self._padded = max(ranks) if options.pad_ranks else None
        self._readers = TensorReader(source.target.checkpoint.source), TensorReader(served.target.checkpoint.source)
        self._factors = FactorLoader(self._readers[0])

    def __enter__(self) -> Rebaser:
        for reader in self._readers:
            reader.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for reader in self._readers:
            reader.__exit__(*error)

    def by_weights(self, modules: Sequence[PlacedModule]) -> Iterator[Rebased]:
        """Each module by its weights alone."""
        yield from self._side_by_side((item, None, None) for item in modules)

    def by_inputs(self, run: Run, batches: Sequence[torch.Tensor]) -> Iterator[Rebased]:
        """Every module, in the order in which the layers run; those that no input reaches come last."""
        waiting = {item.key: item for item in self._served.modules}
        by_path = {item.module.path: item for item in self._served.modules if item.experts == 1}
        for layer in run.run(batches):
            item = by_path[layer.path]
            W = self._weight(item)
            rebased = self._rebase(item, layer.inputs, W)
            run.fit(layer.path, _merged_(W, rebased.converted))
            del waiting[item.key]
            yield rebased
        yield from self.by_weights(list(waiting.values()))

    def by_statistics(self, stored: StoredStatistics, modules: Sequence[PlacedModule]) -> Iterator[Rebased]:
        """Each module by the inputs that were collected of the base it was trained on; no model runs."""
        paths = (item.module.path if item.experts == 1 else None for item in modules)
        with TensorReader() as reader:
            known = zip(modules, stored.inputs_of(paths, reader), strict=True)
            yield from self._side_by_side((item, read, None if read is None else stored) for item, read in known)

    def spectra(self, inputs: Iterable[tuple[PlacedModule, RegressionInputs | None]]) -> Iterator[Spectrum]:
        """What each rank of a module will be worth, as far as its inputs are known beforehand."""
        for item, known in inputs:
            trained = self._trained[item.key]
            T = adapted_weight_(trained, self._factors, self._base(trained))
            W = self._weight(item)
            seen, whole = T - W, T
            if known is not None:
                seen, whole = known.seen(seen, W), known.root.multiply(T)
            yield Spectrum(
                item.module.path, item.weight.shape, squared_singular_values(seen) / (squared_norm(whole) or 1.0)
            )

    def _side_by_side(self, jobs: Iterable[_Job]) -> Iterator[Rebased]:
        """Modules that wait for nothing of each other, on as many cores as their memory allows."""

        def refit(job: _Job) -> Rebased:
            item, read, stored = job
            with torch.inference_mode():  # which is a setting of each thread
                W = self._weight(item) if self._options.wanted(item).gain is None else None
                return self._rebase(item, None if read is None else read(), W, stored)

        sizes = refit_bytes(self._served.modules, self._options)
        if sizes:
            workers = workers_for(list(sizes.values()), MEMORY)
            yield from in_order(refit, jobs, workers, nbytes=lambda job: sizes[job[0].key], budget=MEMORY)

    def _rebase(
        self,
        item: PlacedModule,
        inputs: RegressionInputs | None,
        W: torch.Tensor | None,
        stored: StoredStatistics | None = None,
    ) -> Rebased:
        """The module. ``W`` is the other base's weight; None, where nothing but the difference is needed of it."""
        trained = self._trained[item.key]
        base = self._base(trained)
        own = matrix_fingerprint(base)
        if stored is not None:
            stored.check(item.module.path, own)
        fault = None if trained.scalars is None else base_fault(trained.scalars, own)
        if fault is not None:
            raise BaseMismatchError(f"{trained.weight.name} of --base {fault}: give the base it was made for.")
        update = update_of(trained, self._factors, base)
        if W is None:
            change, found = base, subtract_weight_(base, item.weight, self._readers[1])
        else:
            change, found = base.sub_(W), matrix_fingerprint(W)
        found = finite_base(found, item)
        moved = torch.linalg.vector_norm(change).item()
        change = update.add_to_(change)
        wanted = self._options.wanted(item)
        gains, known = wanted.gain is None, update.directions
        target = DensePencil(change, W if gains else None, None if known is None else known.T)
        seen = None if inputs is None else inputs.pencil(change, W, gains=gains, rank=wanted.rank)
        root = None if inputs is None else inputs.root
        refitted = ModuleRefit(target, wanted, root, seen).solve()
        A, B = refitted.A, refitted.B
        if self._padded is not None:
            A, B = (pad(A, (0, 0, 0, self._padded - len(A))), pad(B, (0, self._padded - len(A))))
        before = None
        if inputs is not None and seen is not None:
            # M(1) of the source's update put on the other base as it is: what that leaves of the outputs, measured as
            # the refit's own error is.
            size = seen.squared_norms()[0] ** 0.5
            left = torch.linalg.vector_norm(update.taken_from_(seen.S, inputs.root)).item()
            before = left / size if size else 0.0
        magnitude = None
        if refitted.gain != 1.0:
            assert W is not None  # it is read wherever a gain is looked for
            magnitude = row_squares(torch.addmm(W, B.float(), A.float())).sqrt_().mul_(refitted.gain)
        converted = converted_module(
            item, "low-rank", refitted.gain, found, product_norm(B, A), refitted.error, A, B, magnitude,
            refitted.output_error,
        )  # fmt: skip
        tokens = None if inputs is None else inputs.tokens
        return Rebased(item, converted, moved / own.norm if own.norm else moved, before, tokens)

    def _base(self, trained: PlacedModule) -> torch.Tensor:
        return read_weight(trained.weight, self._readers[0], torch.empty(trained.weight.numel))

    def _weight(self, item: PlacedModule) -> torch.Tensor:
        return read_weight(item.weight, self._readers[1], torch.empty(item.weight.numel))


def notes_on_inputs(results: Sequence[Rebased]) -> list[str]:
    """What the inputs that were seen could not serve, of modules that were to be fitted to them."""
    unseen = [item.placed.module.path for item in results if item.tokens is None]
    few = [item for item in results if item.tokens is not None and item.tokens < item.placed.weight.shape[1]]
    notes = []
    if unseen:
        named = ", ".join(unseen[:3]) + (", …" if len(unseen) > 3 else "")
        notes.append(f"no inputs are known of {counted(len(unseen), 'module')}, refitted by the weights alone: {named}")
    if few:
        widest = max(few, key=lambda item: item.placed.weight.shape[1])
        notes.append(
            f"{widest.tokens:,} tokens are fewer than the inputs of {counted(len(few), 'module')} "
            f"({widest.placed.weight.shape[1]:,} at most): directions that none of them showed were fitted by the "
            "weights; more --samples help"
        )
    return notes


def _merged_(W: torch.Tensor, converted: Converted) -> torch.Tensor:
    """The weight with a refit as it is written, in the memory of W."""
    return W.addmm_(converted.B.float(), converted.A.float()).mul_(converted.scalars.base_gain)


def refit_bytes(modules: Sequence[PlacedModule], options: RebaseOptions) -> dict[tuple[str, int | None], int]:
    """Memory of each refit, by the modules' keys: the weight, what the layer's outputs see of it, P, Gram matrices.

    Of a layer's weight that is scaled as well, or that it was trained to as a whole, there are two of each.
    """
    sizes = {}
    for item in modules:
        wanted, shape = options.wanted(item), item.weight.shape
        most = wanted.rank if wanted.tolerance is None else wanted.max_rank
        grams = 0 if is_randomized(shape, most, 0) else dense_bytes(shape)
        thin = wanted.gain is not None and item.module.magnitude is None and item.module.has_factors
        # Of P, what lies above the diagonal is not touched.
        sizes[item.key] = 4 * ((2 if thin else 4) * item.weight.numel + shape[1] ** 2 // 2) + grams
    return sizes
