"""The result of an export on disk: converted into a spool, written by the format, put in its place as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from mapconv.checkpoint.reader import TensorReader
from mapconv.checkpoint.staging import check_output, check_output_file, staged_file, staged_folder
from mapconv.errors import UnsupportedError
from mapconv.exporting.limits import Limits
from mapconv.exporting.plain import Export, PlainModule, Spool
from mapconv.refit.plan import UpgradePlan


def write(
    plan: UpgradePlan, limits: Limits, base: str, target: Path, *, leaves: frozenset[str], quiet: bool
) -> tuple[tuple[PlainModule, ...], int | None]:
    """Convert the plan's modules and write them to ``target``; returns them, and their rank where they have one.

    ``leaves`` of names stand for all experts of the model (``exporting.experts``).
    """
    # Beside the result in its staging folder, where the next run removes what a killed one leaves.
    spool = Spool((target.parent if limits.format.suffix else target) / ".modules.safetensors")
    try:
        spool.fill(plan, quiet=quiet)
        modules = tuple(spool.modules())
        ranks = {module.rank for module in modules}
        server = limits.server
        if server is not None and server.largest_rank is not None and max(ranks) > server.largest_rank:
            raise UnsupportedError(
                f"the result has rank {max(ranks)}, and {server.title} takes {server.largest_rank} at most: pass "
                f"--rank {server.largest_rank}."
            )
        rank = max(ranks) if limits.one_rank else None
        with TensorReader(plan.placed.target.checkpoint.source) as reader:
            limits.format.write(Export(plan.placed, modules, reader, rank, base, limits.experts, leaves), target)
    finally:
        spool.path.unlink(missing_ok=True)
    return modules, rank if rank is not None or len(ranks) > 1 else max(ranks)


def check_place(out: Path, limits: Limits, inputs: list[Path], *, nbytes: int, force: bool) -> None:
    """Refuse an output that is taken, is an input, has no room, or is named as something else.

    Raises:
        OutputError: with the sentence that says which.
    """
    suffix = limits.format.suffix
    if suffix is None:
        check_output(out, force=force, inputs=inputs, nbytes=nbytes)
    else:
        check_output_file(out, force=force, suffix=suffix, inputs=inputs, nbytes=nbytes)


@contextmanager
def discarded(out: Path, limits: Limits) -> Iterator[Path]:
    """The folder or file to write in place of ``out``, which is gone afterwards."""
    with TemporaryDirectory(prefix="mapconv-") as folder:
        place = Path(folder, out.name)
        if limits.format.suffix is None:
            place.mkdir()
        yield place


@contextmanager
def staged(out: Path, limits: Limits, *, force: bool) -> Iterator[Path]:
    """The folder or file to write, which becomes ``out``."""
    if limits.format.suffix is None:
        with staged_folder(out, force=force) as staging:
            yield staging
    else:
        with staged_file(out, out.name) as staging:
            yield staging / out.name
