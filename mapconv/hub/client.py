"""The Hub's client in our hands: quiet, and with a limit to every wait."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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

    What it logs while it waits and retries reaches the user as an error's sentence if it comes to that.
    """
    from huggingface_hub import utils

    if bars is None:
        bars = sys.stderr.isatty()
    logger = logging.getLogger("huggingface_hub")
    level, had_bars = logger.level, not utils.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if not bars and had_bars:
        utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if not bars and had_bars:
            utils.enable_progress_bars()


def limit_waits() -> None:
    """Put limits on the client's shared session: it has none for most calls, and a silent server holds it for ever.

    The client replaces its session after a failed connection, so this is called before each attempt.
    """
    from huggingface_hub.utils import get_session

    limit_session(get_session())
