"""The Hub's client in our hands: quiet, and with a limit to every wait."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mapconv.hub.limits import limit_session


class Secret:
    """A token, or None for the one that the client finds; it does not show where an object is printed."""

    def __init__(self, token: str | None) -> None:
        self.value = lambda: token

    def __repr__(self) -> str:
        return "<token>"


@contextmanager
def quiet_client(*, bars: bool | None = None) -> Iterator[None]:
    """Silence the client's log lines and warnings; its bars stay where a terminal watches, unless ``bars`` is False.

    What it logs while it waits and retries reaches the user as an error's sentence if it comes to that. All of this is
    the process's: of several threads the first one silences it, and the last one lets it speak again.
    """
    _SILENCE.begin(bars=sys.stderr.isatty() if bars is None else bars)
    try:
        yield
    finally:
        _SILENCE.end()


class _Silence:
    """What is to be put back when nobody wants it any more."""

    def __init__(self) -> None:
        self._lock, self._users, self._undo = threading.Lock(), 0, ExitStack()

    def begin(self, *, bars: bool) -> None:
        from huggingface_hub import utils

        with self._lock:
            self._users += 1
            if self._users == 1:
                logger = logging.getLogger("huggingface_hub")
                self._undo.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.ERROR)
                self._undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            if not bars and not utils.are_progress_bars_disabled():
                self._undo.callback(utils.enable_progress_bars)
                utils.disable_progress_bars()

    def end(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._undo.close()


_SILENCE = _Silence()


def limit_waits() -> None:
    """Put limits on the client's shared session: it has none for most calls, and a silent server holds it for ever.

    The client replaces its session after a failed connection, so this is called before each attempt.
    """
    from huggingface_hub.utils import get_session

    limit_session(get_session())
