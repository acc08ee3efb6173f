"""Progress bars for long work: on stderr, and silent where no terminal watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

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
