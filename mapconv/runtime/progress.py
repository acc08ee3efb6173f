"""Progress bars for long work: on stderr, and silent where no terminal watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

from tqdm import tqdm

# Bars are advanced by threads alone. tqdm's own lock serves processes as well: it starts a helper process, and a run
# that is killed leaves a semaphore behind, of which that helper then complains on the user's terminal.
tqdm.set_lock(RLock())

#: Called with the amount of work just done.
Advance = Callable[[int], object]


class StepBar:
    """A bar of training steps, with the losses and the speed beside it."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._figures: dict[str, str] = {}

    def advance(self, *, train: float, rate: float) -> None:
        """One step done, at its training loss and tokens a second."""
        self._figures |= {"loss": f"{train:.3g}", "tokens/s": f"{rate:.0f}"}
        self._bar.set_postfix(self._figures, refresh=False)
        self._bar.update()

    def show(self, *, held_out: float) -> None:
        self._figures["held out"] = f"{held_out:.3g}"
        self._bar.set_postfix(self._figures)


@contextmanager
def progress_bar(total: int, label: str, *, unit: str = "B", quiet: bool = True) -> Iterator[Advance]:
    """Yield a function that advances a bar of ``total`` units; no bar with ``quiet`` or off a terminal."""
    with _bar(total, label, unit=unit, unit_scale=unit == "B", quiet=quiet) as bar:
        yield bar.update


@contextmanager
def work_bar(costs: Iterable[float], label: str, *, unit: str, quiet: bool = True) -> Iterator[Callable[[float], None]]:
    """Yield a function that counts one item done, of the cost given: the bar moves by what takes the time.

    Items cost very unlike amounts, so that their mere count would make the time left jump.
    """
    costs, done = list(costs), [0]
    count = f"{{postfix[0]}} of {len(costs):,} {unit}s"
    look = f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {count} [{{elapsed}}<{{remaining}}]"
    with _bar(sum(costs), label, quiet=quiet, bar_format=look, postfix=done) as bar:

        def advance(cost: float) -> None:
            done[0] += 1
            bar.update(cost)

        yield advance


@contextmanager
def step_bar(total: int, label: str, *, done: int = 0, quiet: bool = True) -> Iterator[StepBar]:
    """Yield a bar of ``total`` steps of which ``done`` were made before."""
    with _bar(total, label, unit="step", unit_scale=False, quiet=quiet, initial=done) as bar:
        yield StepBar(bar)


@contextmanager
def tally_bar(label: str, *, unit: str, quiet: bool = True) -> Iterator[Callable]:
    """Yield a function that starts a bar once its total is known: (total, state) → a function to call after changes.

    ``state()`` gives the count so far and a table of further figures to show.
    """
    bars: list[tqdm] = []

    def start(total: int, state: Callable[[], tuple[int, dict[str, object]]]) -> Callable[[], None]:
        bar = _bar(total, label, unit=f" {unit}s", quiet=quiet)
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


def _bar(total: float, label: str, *, quiet: bool, **settings: Any) -> tqdm:
    return tqdm(
        total=total,
        desc=label,
        disable=True if quiet else None,  # None: tqdm's own word for "unless stderr is a terminal"
        leave=False,
        dynamic_ncols=True,
        **settings,
    )
