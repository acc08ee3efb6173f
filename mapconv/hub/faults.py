"""What the Hub's client raises, as one sentence each, and which of it is worth another attempt.

No error of the client is kept as a cause: an HTTP error holds its request, and a request holds the token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeVar

from mapconv.errors import HubError, MapconvError
from mapconv.hub.client_errors import deepest, is_transient, retry_after, status_of
from mapconv.hub.sentences import explain

Result = TypeVar("Result")

ATTEMPTS = 4
FIRST_WAIT = 1.0
#: No single wait is longer than this; a Hub that asks for more is told to the user instead.
LONGEST_WAIT = 60.0
#: Seconds without a byte from the server; the client itself would wait for ever on most calls.
REQUEST_TIMEOUT = 120.0


def ask_hub(
    call: Callable[[], Result],
    name: str,
    doing: Literal["read", "write"],
    *,
    hint: Callable[[Exception], str] = lambda error: "",
) -> Result:
    """Run what talks to the Hub about ``name``, and turn whatever the client raises into one sentence.

    A function and no context manager: what a context manager raises has the client's error as its context.

    Args:
        hint: what to add to the sentence for an error, or "".

    Raises:
        HubError: with what is wrong and what to do next. The errors of mapconv and of this machine's disk pass.
    """
    try:
        return call()
    except MapconvError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        more = hint(error)
        sentence = explain(deepest(error), name, doing)
        failure = HubError(f"{sentence.removesuffix('.')}, {more}." if more else sentence)
        failure.transient, failure.status = is_transient(error), status_of(deepest(error))
    raise failure


def with_retries(call: Callable[[], Result], *, is_safe: Callable[[Exception], bool]) -> Result:
    """Call again, after growing and capped waits, as long as the error is transient and ``is_safe`` says so."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except Exception as error:
            seconds = _seconds_to_wait(error, attempt)
            if seconds > LONGEST_WAIT or not is_transient(error) or not is_safe(error):
                raise
        time.sleep(seconds)
    return call()


def always(error: Exception) -> bool:
    """For calls that may be repeated after any transient error: reading, and what compares before it writes."""
    return True


def _seconds_to_wait(error: Exception, attempt: int) -> float:
    asked = retry_after(error)
    return asked if asked is not None else min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
