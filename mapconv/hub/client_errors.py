"""What an error of the Hub's client is: its status, whether it was the network, whether it may pass.

The client's errors share no root: its own classes, those of its HTTP library (httpx or httpx2, by version), of hf_xet,
and of JSON.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path

from mapconv.errors import HubError

_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
#: Calls that the client repeats by itself: another round of ours would multiply the waiting.
_RETRIED_BY_CLIENT = ("/preupload/", "/info/lfs/")
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2")


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    if type(error).__name__ == "LocalEntryNotFoundError":  # "not in the cache, and asking the Hub failed": why?
        error = deepest(error)
    if isinstance(error, HubError):
        return error.transient
    status = status_of(error)
    if status is not None:
        return status in _TRANSIENT and not any(part in _url(error) for part in _RETRIED_BY_CLIENT)
    return is_transport(error) or is_garbled(error)


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
    """An answer that is not JSON, or JSON of another shape: a proxy's page in place of the Hub's."""
    if isinstance(error, json.JSONDecodeError):
        return True
    # JSON of another shape fails on its first use, inside the client; the same error from our own lines is a bug.
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, AttributeError | KeyError | TypeError)
        and bool(frames)
        and ("huggingface_hub" in Path(frames[-1].filename).parts)
    )


def _url(error: BaseException) -> str:
    return str(getattr(getattr(getattr(error, "response", None), "request", None), "url", ""))
