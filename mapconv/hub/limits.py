"""Limits on what the Hub's client receives: no wait without an end, no body longer than announced, none that drips.

They sit in the client's shared session, so they hold for each of its calls, on the Hub's host and on any that it
redirects to.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from mapconv.errors import HubError
from mapconv.hub import faults

#: A body that brings less than this in ``faults.REQUEST_TIMEOUT`` seconds is as good as silent.
LEAST_BYTES = 64 << 10
#: The longest answer of the Hub's API, which gives long lists page by page.
_MOST_BYTES = 64 << 20
#: Sizes of files by the address that the Hub sends the client to.
_announced: dict[str, int] = {}


def limit_session(session: Any) -> None:
    """Put the limits on a session, unless they are there."""
    session.timeout = faults.REQUEST_TIMEOUT
    hooks = session.event_hooks
    if _limit_waits not in hooks["request"]:
        watch = _watcher(sys.modules[type(session).__mro__[-2].__module__.partition(".")[0]].SyncByteStream)
        session.event_hooks = {
            "request": [*hooks["request"], _limit_waits],
            "response": [*hooks["response"], watch],
        }


def _limit_waits(request: Any) -> None:
    # The client passes "no timeout" with many calls, which overrides the session's.
    waits = request.extensions.get("timeout") or {}
    limited = {key: waits.get(key) or faults.REQUEST_TIMEOUT for key in ("connect", "read", "write", "pool")}
    request.extensions["timeout"] = limited


def _watcher(stream_class: type) -> Callable[[Any], None]:
    """A hook that watches each response's body; the classes of httpx and httpx2 have no common root."""

    class WatchedStream(stream_class):
        def __init__(self, stream: Any, url: str, limit: int) -> None:
            self._stream, self._url, self._limit = stream, url, limit

        def __iter__(self) -> Iterator[bytes]:
            return _watched(self._stream, self._url, self._limit)

        def close(self) -> None:
            self._stream.close()

    def watch(response: Any) -> None:
        url = str(response.request.url)
        size = _number(response.headers.get("X-Linked-Size")) or _announced.get(url)
        target = response.headers.get("Location")
        if target and size is not None:
            _announced[str(response.request.url.join(target))] = size
        length = _number(response.headers.get("Content-Length"))
        # Without either, it is an answer of the Hub's API: the client itself refuses files of unknown size.
        limit = min((number for number in (size, length) if number is not None), default=_MOST_BYTES)
        response.stream = WatchedStream(response.stream, url.partition("?")[0], limit)

    return watch


def _watched(stream: Any, url: str, limit: int) -> Iterator[bytes]:
    received = counted = 0
    since = time.monotonic()
    for chunk in stream:
        received += len(chunk)
        if received > limit:
            raise HubError(
                f"{url} sends more than the {limit:,} bytes that it should: check HF_ENDPOINT, and whether a proxy "
                "is in between."
            )
        now = time.monotonic()
        if now - since >= faults.REQUEST_TIMEOUT:
            if received - counted < LEAST_BYTES:
                error = HubError(
                    f"{url} sent only {received - counted:,} bytes in {now - since:.0f} seconds: check the network, "
                    "and run the same command again."
                )
                error.transient = True
                raise error
            since, counted = now, received
        yield chunk


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 20 else None
