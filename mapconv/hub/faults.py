"""What the Hub's client raises, as one sentence each, and which of it is worth another attempt.

The client's errors share no root: its own classes, those of its HTTP library (httpx or httpx2, by version), of hf_xet,
and of JSON. None of them is kept as a cause: an HTTP error holds its request, and a request holds the token.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from mapconv.errors import HubError, MapconvError

Result = TypeVar("Result")

ATTEMPTS = 4
FIRST_WAIT = 1.0
#: No single wait is longer than this; a Hub that asks for more is told to the user instead.
LONGEST_WAIT = 60.0
#: Seconds without a byte from the server; the client itself would wait for ever on most calls.
REQUEST_TIMEOUT = 120.0
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
#: Calls that the client repeats by itself: another round of ours would multiply the waiting.
_RETRIED_BY_CLIENT = ("/preupload/", "/info/lfs/")
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2")


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
        from mapconv.hub.sentences import explain

        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        more = hint(error)
        sentence = explain(deepest(error), name, doing)
        failure = HubError(f"{sentence.removesuffix('.')}, {more}." if more else sentence)
        failure.transient = is_transient(error)
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


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed a moment later."""
    if type(error).__name__ == "LocalEntryNotFoundError":  # "not in the cache, and asking the Hub failed": why?
        error = deepest(error)
    status = status_of(error)
    if status is not None:
        return status in _TRANSIENT and not any(part in _url(error) for part in _RETRIED_BY_CLIENT)
    return is_transport(error) or is_garbled(error)


def always(error: Exception) -> bool:
    """For calls that may be repeated after any transient error: reading, and what compares before it writes."""
    return True


def never_arrived(error: Exception) -> bool:
    """Whether the request certainly had no effect: refused before work began, or no connection was made."""
    return status_of(error) == 429 or type(error).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout")


def is_transport(error: BaseException) -> bool:
    """A connection that was not made, broke, or fell silent."""
    if status_of(error) is not None or is_offline(error):
        return False
    library = type(error).__module__.partition(".")[0]
    return library in _HTTP_LIBRARIES or isinstance(error, ConnectionError | TimeoutError)


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an error carries, or None."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _seconds_to_wait(error: Exception, attempt: int) -> float:
    asked = retry_after(error)
    return asked if asked is not None else min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)


def retry_after(error: BaseException) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def deepest(error: BaseException) -> BaseException:
    """The error that says most: the client wraps a status in a RuntimeError, and offline mode in 'not found'."""
    from huggingface_hub.errors import IncompleteSnapshotError

    while not (_is_telling(error) or isinstance(error, IncompleteSnapshotError)):
        inner = error.__cause__ or error.__context__
        if inner is None or not (_is_telling(inner) or inner.__cause__):
            break
        error = inner
    return error


def _is_telling(error: BaseException) -> bool:
    # A rejected card is a ValueError with the Hub's reasons; the status that caused it says less.
    return status_of(error) is not None or is_transport(error) or is_offline(error) or "Invalid metadata" in str(error)


def is_offline(error: BaseException) -> bool:
    return type(error).__name__ == "OfflineModeIsEnabled"


def is_garbled(error: BaseException) -> bool:
    """An answer that is no JSON, or JSON of another shape: a proxy's page in place of the Hub's."""
    if isinstance(error, json.JSONDecodeError):
        return True
    # JSON of another shape fails on its first use, inside the client; the same error from our own lines is a bug.
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, AttributeError | KeyError | TypeError)
        and bool(frames)
        and ("huggingface_hub" in Path(frames[-1].filename).parts)
    )


def _url(error: Exception) -> str:
    return str(getattr(getattr(getattr(error, "response", None), "request", None), "url", ""))
