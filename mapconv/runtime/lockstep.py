"""Run several batches through a model block by block: all of them through the first block, then through the second, …

Each batch's forward pass runs in a thread of its own, one at a time, and waits after every block. So the model's own
code decides what each block is called with, whatever the architecture, and between two blocks the caller can use what
the block was seen to do before the memory for it is needed by the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from mapconv.runtime.threads import wait_for_ends


class _Stop(BaseException):
    """Ends a forward pass whose further results nobody needs."""


class _Pass:
    """One batch's forward pass, which runs only between ``resume`` and its next pause."""

    def __init__(self, forward: Callable[[], object]) -> None:
        self._forward = forward
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.finished = self._stopping = False
        self.block: str | None = None
        self.seen: Any = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def resume(self) -> str | None:
        """Run on to the next pause; returns the block that was just left, or None at the end of the pass.

        Raises:
            Whatever the forward pass raised.
        """
        self._go.release()
        self._paused.acquire()
        if self.error is not None:
            raise self.error
        return None if self.finished else self.block

    def pause(self, block: str, seen: Any) -> None:
        """Called from within the pass, by a hook."""
        self.block, self.seen = block, seen
        self._paused.release()
        self._go.acquire()
        if self._stopping:
            raise _Stop

    def stop(self) -> None:
        if not self.finished:
            self._stopping = True
            self._go.release()
        self.thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._stopping:
                with torch.inference_mode():
                    self._forward()
        except _Stop:
            pass
        except BaseException as error:
            self.error = error
        self.finished = True
        self._paused.release()


def in_lockstep(
    blocks: dict[str, torch.nn.Module], passes: Sequence[Callable[[], Any]], enter: Callable[[str], None]
) -> Generator[str | None, None, None]:
    """Yield the name of each block once every pass has left it; at last None, when the passes have ended.

    A block that runs again in the same pass is not reported again. The passes are ended when the iterator is closed.

    Args:
        blocks: modules of the model by name, none inside another.
        passes: the forward passes; each is called once, in a thread.
        enter: called with a block's name whenever a pass comes to it.
    """
    driver = _Driver(passes)

    def before(name: str) -> Callable[..., None]:
        return lambda *_: enter(name)

    def behind(name: str) -> Callable[..., None]:
        return lambda *_: driver.pause(name)

    handles = [module.register_forward_pre_hook(before(name)) for name, module in blocks.items()]
    handles += [module.register_forward_hook(behind(name)) for name, module in blocks.items()]
    for name, _ in driver.run(handles):
        yield name


class Seen(NamedTuple):
    """What a pass gave a layer that it waits at, and what the layer made of it; None where it has not run yet."""

    input: torch.Tensor
    output: torch.Tensor | None = None


def paused_at(
    layers: dict[str, torch.nn.Module], passes: Sequence[Callable[[], Any]], behind: Collection[str] = ()
) -> Generator[tuple[str, dict[int, Seen]]]:
    """Yield the name of each layer and what every pass has seen there, by the pass's number, before any pass runs it.

    What the caller does to the layer between two steps is what the passes then compute with. At layers named in
    ``behind`` the passes wait when they have run them. A pass that does not come to a layer has nothing there (an
    expert that no token was routed to); a layer that runs again is not reported again. The passes are ended when the
    iterator is closed.
    """
    driver = _Driver(passes)

    def before(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            driver.pause(name, Seen(_first(arguments, named)))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: torch.Tensor) -> None:
            driver.pause(name, Seen(_first(arguments, named), output))

        return hook

    handles = [
        module.register_forward_hook(after(name), with_kwargs=True)
        if name in behind
        else module.register_forward_pre_hook(before(name), with_kwargs=True)
        for name, module in layers.items()
    ]
    for name, seen in driver.run(handles):
        if name is not None:
            yield name, seen


def _first(arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return arguments[0] if arguments else next(iter(named.values()))


class _Driver:
    """Resumes every pass to its next pause, in turn."""

    def __init__(self, passes: Sequence[Callable[[], Any]]) -> None:
        self._forwards = passes
        self._current: dict[int, _Pass] = {}
        self._left: set[str] = set()

    def pause(self, name: str, seen: Any = None) -> None:
        """Called by a hook, within a pass; the first visit of all passes to a place counts."""
        if name not in self._left:
            self._current[threading.get_ident()].pause(name, seen)

    def run(self, handles: Sequence[RemovableHandle]) -> Iterator[tuple[str | None, dict[int, Any]]]:
        """Yield each place with what every pass that waits there has seen; None for passes that have ended."""
        running: list[_Pass] = []
        try:
            for forward in self._forwards:
                running.append(_Pass(forward))
                ident = running[-1].thread.ident
                assert ident is not None  # the thread has started
                self._current[ident] = running[-1]
            active = dict(enumerate(running))
            while active:
                places: dict[str | None, dict[int, Any]] = {}
                for number, each in active.items():
                    place = each.resume()
                    places.setdefault(place, {})[number] = each.seen
                active = {number: each for number, each in active.items() if not each.finished}
                # All passes of one model mostly run the same places, so that they wait at the same one.
                for name in sorted(places, key=str):
                    if name is not None:
                        self._left.add(name)
                    yield name, places[name]
        finally:
            for each in running:
                each.stop()
            wait_for_ends(each.thread.native_id for each in running if each.thread.native_id is not None)
            for handle in handles:
                handle.remove()
