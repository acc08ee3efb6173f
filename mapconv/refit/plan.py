"""The plan of an upgrade: what becomes of each module, decided once from names, shapes and options.

It is what ``--dry-run`` prints, what the converter and the writer go by, and what the progress bar counts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import torch

from mapconv.adapter import Direction, TensorRef
from mapconv.algebra.dense import dense_bytes
from mapconv.algebra.lowrank import is_randomized
from mapconv.algebra.moments import Statistics
from mapconv.algebra.norms import BLOCK_ELEMENTS
from mapconv.checkpoint.reader import TORCH_DTYPES
from mapconv.data import Dataset
from mapconv.errors import UnsupportedError
from mapconv.formats.methods import METHODS
from mapconv.options.shared import MAX_RANK
from mapconv.options.surgery import EXTRACT_RANK
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.weights import PlacedModule
from mapconv.refit.solving import SMALLEST_GAIN
from mapconv.runtime.threads import worker_count

#: What the factors may be stored in; ``auto`` is the source's own.
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
#: ``keep-lora``: its own factors, of which the scalars follow from norms. ``keep-dora``: DoRA's own factors and
#: magnitudes. ``keep-map``: its own gains, and its factors times a number. ``resize``: a LoRA cut to a rank or an
#: error (of its outputs, with data), by its factors alone. ``refit``: the closest MAP weight. What is kept is exact.
#: ``keep-rows``: another method's scales of rows, as the magnitudes of a DoRA whose B is 0. Weights whose columns such
#: an adapter scales are refitted beside them, with the row norms that it gives them.
Kind = Literal["keep-lora", "keep-dora", "keep-map", "keep-rows", "resize", "refit"]

#: Why every module of a result with experts is a plain LoRA.
NO_DORA_OF_STACKS = (
    "every weight keeps a gain of 1, so that the result is a plain LoRA: PEFT has no DoRA for a stack of experts, and "
    "this has some"
)
#: Kinds that need no more of their base than its norm, and those that are solved for.
_LIGHT, _SOLVED = ("keep-lora", "resize"), ("resize", "refit")

#: Products with the whole weight that a refit takes, and columns that it has besides the rank; for the estimate alone.
_PRODUCTS, _MORE_COLUMNS = 24, 8
#: Memory of the process before any weight is read, and beside the model where one runs: imports, and buffers.
IMPORTS, IMPORTS_WITH_MODEL = 300 << 20, 600 << 20


@dataclass(frozen=True)
class ConvertOptions:
    """What the caller asked for. Of ``rank`` and ``tolerance`` at most one is not None; both None: the source's rank.

    ``statistics`` of the layers' inputs that refits weigh errors by; None: all weights alike.
    """

    rank: int | None = None
    tolerance: float | None = None
    max_rank: int = MAX_RANK.fallback
    direction: Direction = "low-rank"
    lora_compatible: bool = False
    dtype: Dtype = "float32"
    device: str = "auto"
    statistics: Statistics | None = None
    #: Every module gets this rank: those above it are cut, and those below it padded with zeros.
    rank_at_most: int | None = None

    @property
    def limits_rank(self) -> bool:
        return self.rank is not None or self.tolerance is not None

    def rank_of(self, placed: PlacedModule) -> int:
        """The rank that a refit of this module solves for."""
        if self.direction == "dora" and placed.module.method is not None:
            return self.rank or EXTRACT_RANK.fallback
        return self.rank or min(placed.effective_rank, self.rank_at_most or placed.effective_rank)

    def stored_dtype(self, placed: PlacedModule) -> torch.dtype:
        """The dtype that this module's factors are written in."""
        return TORCH_DTYPES[placed.module.lora_A.dtype] if self.dtype == "auto" else getattr(torch, self.dtype)


@dataclass(frozen=True)
class Job:
    """One module: what becomes of it, the rank of the result (with a tolerance the source's), and what it takes.

    ``work`` is in floating-point operations, as far as they can be counted before.
    """

    placed: PlacedModule
    kind: Kind
    rank: int
    stored_bytes: int
    working_bytes: int
    work: float

    @property
    def is_solved(self) -> bool:
        """Whether the result is an approximation, that of a rank or an error."""
        return self.kind in _SOLVED


@dataclass(frozen=True)
class PlanSummary:
    """A plan in numbers: modules kept exactly and refitted, tensors copied unchanged, the result's ranks.

    ``sequences`` and ``tokens`` of data that the source runs on. ``seconds`` and ``memory`` (bytes) are rough, and None
    where nobody asked for them.
    """

    modules: int
    exact: int
    refitted: int
    whole: int
    ranks: tuple[int, ...]
    tolerance: float | None
    sequences: int
    tokens: int
    nbytes: int
    seconds: float | None
    memory: int | None

    def to_dict(self) -> dict[str, Any]:
        return vars(self).copy()


@dataclass(frozen=True)
class UpgradePlan:
    """Every module's job, in the order of ``placed.modules``."""

    placed: PlacedAdapter
    options: ConvertOptions
    jobs: tuple[Job, ...]

    @cached_property
    def _kinds(self) -> dict[tuple[str, int | None], Kind]:
        return {job.placed.key: job.kind for job in self.jobs}

    def kind_of(self, placed: PlacedModule) -> Kind:
        return self._kinds[placed.key]

    @property
    def is_exact(self) -> bool:
        """Whether nothing is refitted, so that neither data nor training has anything to improve."""
        return not any(job.is_solved for job in self.jobs)

    @property
    def light(self) -> list[PlacedModule]:
        """Modules that need no more of their base weight than the norm."""
        return [job.placed for job in self.jobs if job.kind in _LIGHT]

    @property
    def reading(self) -> list[PlacedModule]:
        """Modules whose base weight is read: for its values, or for an initialization that is undone."""
        return [job.placed for job in self.jobs if job.kind not in _LIGHT or job.placed.initialization]

    @property
    def nbytes(self) -> int:
        """Bytes of the factors as written; with a tolerance, at the source's rank."""
        return sum(job.stored_bytes for job in self.jobs) + sum(
            ref.nbytes for ref in self.placed.adapter.others.values()
        )

    @property
    def workers(self) -> int:
        return worker_count(max(job.working_bytes for job in self.jobs))

    def summary(self, data: Dataset | None, *, estimate: bool) -> PlanSummary:
        """The plan in numbers; ``data`` is what the model runs on, None where it does not."""
        sequences, tokens = (0, 0) if data is None else (len(data), data.tokens)
        refitted = sum(job.is_solved for job in self.jobs)
        return PlanSummary(
            modules=len(self.jobs),
            exact=len(self.jobs) - refitted,
            refitted=refitted,
            whole=len(self.placed.adapter.others),
            ranks=tuple(sorted({job.rank for job in self.jobs})),
            tolerance=self.options.tolerance if refitted else None,
            sequences=sequences,
            tokens=tokens,
            nbytes=self.nbytes,
            seconds=self._seconds(tokens) if estimate else None,
            memory=self._memory(tokens) if estimate else None,
        )

    def _seconds(self, tokens: int) -> float:
        """From the counted operations and the speed of one thin product on this machine, right now."""
        forward = sum(2 * tokens * job.placed.weight.numel for job in self.jobs)
        return (sum(job.work for job in self.jobs) / self.workers + forward) / operations_a_second()

    def _memory(self, tokens: int) -> int:
        working = self.workers * max(job.working_bytes for job in self.jobs)
        if not tokens:
            return IMPORTS + working
        checkpoint = self.placed.target.checkpoint
        return IMPORTS_WITH_MODEL + working + sum(ref.nbytes for ref in checkpoint.tensors.values())


def plan_upgrade(placed: PlacedAdapter, options: ConvertOptions) -> UpgradePlan:
    """Decide for every module; reads nothing.

    Raises:
        UnsupportedError: a module that the options do not fit.
    """
    jobs = tuple(_job(item, options) for item in placed.modules)
    kinds = {job.kind for job in jobs}
    if options.limits_rank and ("keep-dora" in kinds or kinds == {"keep-rows"}):
        raise UnsupportedError(
            f"{placed.adapter.path}: --direction dora keeps {placed.adapter.method}'s own values, exactly and at their "
            "own rank: leave --rank and --tolerance out, or --direction dora, to have it refitted."
        )
    return UpgradePlan(placed, options, jobs)


def _job(placed: PlacedModule, options: ConvertOptions) -> Job:
    kind = _kind(placed, options)
    height, width = placed.weight.shape
    rank = min(options.rank_of(placed) if kind in _SOLVED else placed.effective_rank, height, width)
    rank = 1 if kind == "keep-rows" else options.rank_at_most or rank
    stored = (height + width) * rank * options.stored_dtype(placed).itemsize
    if kind in _LIGHT:
        # No more of the base than its norm, a block at a time; an initialization that is undone reads all of it.
        working = 4 * placed.weight.numel if placed.initialization else 16 * BLOCK_ELEMENTS
        return Job(placed, kind, rank, stored, working, 4 * rank * (height + width) + 2 * placed.weight.numel)
    # W0 in float32, and with data W0·P as well.
    working = (4 if options.statistics is None else 8) * placed.weight.numel
    if placed.module.method is not None:
        working *= 4  # T − W0 as well, and the matrices that PEFT merges it through
    if kind == "refit":
        most = rank if options.tolerance is None else options.max_rank
        known = placed.effective_rank if placed.module.method is None else 0
        if not is_randomized(placed.weight.shape, most, known):
            working += dense_bytes(placed.weight.shape)  # its Gram matrices
    columns = rank if options.tolerance is None or kind != "refit" else 2 * rank
    products = _PRODUCTS if kind == "refit" else 2
    work = 2 * placed.weight.numel * products * (columns + _MORE_COLUMNS)
    return Job(placed, kind, rank, stored + 4 * height, working, work)


def row_scales(placed: PlacedModule) -> TensorRef | None:
    """What the merge of another method than LoRA multiplies the weight's rows by, if that is all it does."""
    method = placed.module.method
    if method is None:
        return None
    name = METHODS[str(method.config["peft_type"]).upper()].row_scales
    ref = None if name is None else dict(placed.module.own).get(name)
    return ref if ref is not None and ref.shape == (placed.weight.shape[0], 1) else None


def _kind(placed: PlacedModule, options: ConvertOptions) -> Kind:
    module = placed.module
    if options.direction == "dora" and row_scales(placed) is not None:
        return "keep-rows"
    if options.direction == "dora" and module.method is not None:
        return "refit"
    if module.is_dense and not options.limits_rank:
        raise UnsupportedError(
            f"{module.path} has an update of full rank ({module.rank}), and so no rank of its own for the result: give "
            f"--rank or --tolerance{'' if row_scales(placed) is None else ', or --direction dora, which is exact'}."
        )
    if module.method is not None:
        return "refit"
    if module.magnitude is not None:
        if options.direction == "dora" and not (module.rescaling.is_peft and module.delta is None):
            raise UnsupportedError(
                f"{module.path} is a DoRA of a kind that PEFT has not (its magnitudes are those of "
                f"{'inputs' if module.rescaling.axis == 'in' else 'outputs'}, its norm that of the "
                f"{module.rescaling.norm} weight): leave --direction dora out, to have it refitted."
            )
        return "keep-dora" if options.direction == "dora" else "refit"
    kept = options.tolerance is None and options.rank_of(placed) >= placed.effective_rank
    if placed.scalars is not None:
        # What is stored is divided by the base's gain.
        divisible = abs(placed.scalars.base_gain) > SMALLEST_GAIN and not options.lora_compatible
        return "keep-map" if kept and divisible else "refit"
    if kept:
        return "keep-lora"
    return "resize" if module.delta is None else "refit"


@cache
def operations_a_second(columns: int = 24, size: int = 1024) -> float:
    """The best of a few products of a matrix with a thin block, on one core as in a run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix, block = torch.ones(size, size), torch.ones(size, columns)
        return 2 * size * size * columns / min(_timed(matrix, block) for _ in range(8))
    finally:
        torch.set_num_threads(threads)


def _timed(matrix: torch.Tensor, block: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(matrix, block)
    return time.perf_counter() - started
