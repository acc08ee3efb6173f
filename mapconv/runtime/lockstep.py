"""Run several batches through a model block by block: all of them through the first block, then through the second, …

Each batch's forward pass runs in a thread of its own, one at a time, and waits after every block. So the model's own
code decides what each block is called with, whatever the architecture, and between two blocks the caller can use what
the block was seen to do before the memory for it is needed by the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


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

    def pause(self, block: str) -> None:
        """Called from within the pass, by the hook behind each block."""
        self.block = block
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
) -> Iterator[str | None]:
    """Yield the name of each block once every pass has left it; at last None, when the passes have ended.

    A block that runs again in the same pass is not reported again. The passes are ended when the iterator is closed.

    Args:
        blocks: modules of the model by name, none inside another.
        passes: the forward passes; each is called once, in a thread.
        enter: called with a block's name whenever a pass comes to it.
    """
    running: list[_Pass] = []
    current: dict[int, _Pass] = {}
    left: set[str | None] = set()

    def before(name: str) -> Callable[..., None]:
        return lambda *_: enter(name)

    def behind(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if name not in left:
                current[threading.get_ident()].pause(name)

        return hook

    handles = [module.register_forward_pre_hook(before(name)) for name, module in blocks.items()]
    handles += [module.register_forward_hook(behind(name)) for name, module in blocks.items()]
    try:
        for forward in passes:
            running.append(_Pass(forward))
            current[running[-1].thread.ident] = running[-1]
        active = list(running)
        while active:
            # All passes of one model run the same blocks, so that they wait behind the same one.
            names = sorted({each.resume() for each in active}, key=str)
            active = [each for each in active if not each.finished]
            for name in names:
                left.add(name)
                yield name
    finally:
        for each in running:
            each.stop()
        for handle in handles:
            handle.remove()
