"""Progress bars for long work: on stderr, and silent where no terminal watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock

from tqdm import tqdm

# Bars are advanced by threads alone. tqdm's own lock serves processes as well: it starts a helper process, and a run
# that is killed leaves a semaphore behind, of which that helper then complains on the user's terminal.
tqdm.set_lock(RLock())

#: Called with the amount of work just done.
Advance = Callable[[int], object]


@contextmanager
def progress_bar(total: int, label: str, *, unit: str = "B", quiet: bool = True) -> Iterator[Advance]:
    """Yield a function that advances a bar of ``total`` units; ``quiet`` or a stderr that is no terminal hides it."""
    with tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=unit == "B",
        disable=True if quiet else None,  # None: tqdm's own word for "unless stderr is a terminal"
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        yield bar.update


@contextmanager
def tally_bar(label: str, *, unit: str, quiet: bool = True) -> Iterator[Callable]:
    """Yield a function that starts a bar once its total is known: (total, state) → a function to call after changes.

    ``state()`` gives the count so far and a table of further figures to show.
    """
    bars: list[tqdm] = []

    def start(total: int, state: Callable[[], tuple[int, dict[str, object]]]) -> Callable[[], None]:
        bar = tqdm(
            total=total,
            desc=label,
            unit=f" {unit}s",
            disable=True if quiet else None,
            leave=False,
            dynamic_ncols=True,
        )
        bars.append(bar)

        def advance() -> None:
            count, figures = state()
            bar.set_postfix(figures, refresh=False)
            bar.update(count - bar.n)

        return advance

    try:
        yield start
    finally:
        for bar in bars:
            bar.close()
