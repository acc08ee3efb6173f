"""One file on the Hub and its sparse twin here: each byte at its own offset, and a record of those that have arrived.

What a server sends is held against what was asked for: an answer names the range that it brings, and every byte of
that range comes once, from the same version of the file as all before it, or the run stops. Links are never followed
when the twin is written: others may be able to write in the cache.
"""

from __future__ import annotations

import json
import os
import re
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mapconv.checkpoint.flushing import flush_data
from mapconv.checkpoint.headers import MAX_HEADER_BYTES
from mapconv.checkpoint.sparse import punch_hole
from mapconv.checkpoint.staging import replace_file
from mapconv.errors import CheckpointError, HubError
from mapconv.files import LARGE
from mapconv.hub.client import limit_waits
from mapconv.hub.faults import always, with_retries
from mapconv.jsonfile import read_object
from mapconv.runtime.progress import Advance

#: The first request for a file: the length of the header, and with most files all of it.
_FIRST_BYTES = 64 << 10
#: A server may bring less than was asked for in one answer, but not so little that a file takes for ever.
_LEAST_ANSWER = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")

Span = tuple[int, int]


class RangesUnsupportedError(HubError):
    """The server knows no byte ranges, or the weights are not where ranges help: fetch whole files instead."""


@dataclass(frozen=True)
class _Version:
    """What tells one version of a file from another; ``etag`` None where the server sends none."""

    size: int
    etag: str | None


class RangedFile:
    """One remote file and its sparse local twin; safe to use from several threads."""

    def __init__(self, url: str, path: Path, commit: str) -> None:
        self.url, self.path, self._commit = url, path, commit
        self._record = path.with_name(path.name + ".ranges.json")
        self._lock = threading.Lock()
        self._version: _Version | None = None
        self._spans: list[Span] = []
        self._header_stop = _FIRST_BYTES
        #: Before it is swept, a killed run may have left bytes that no record names.
        self._swept = False
        self.read_record()

    @property
    def sha256(self) -> str | None:
        """The hash of the whole file, where the Hub keeps it among its large ones, which it names by that."""
        etag = self._version.etag if self._version else None
        return etag if etag and _SHA256.fullmatch(etag) else None

    def read_record(self) -> None:
        """Take over what this or another process has fetched."""
        with self._lock:
            self._read_record()

    def _read_record(self) -> None:
        try:
            record = read_object(self._record, HubError, limit=LARGE)
            version = _Version(record["size"], record["etag"])
            spans = _merged((int(start), int(stop)) for start, stop in record["have"])
            fits = not self.path.is_symlink() and self.path.stat().st_size == version.size
        except (OSError, HubError, ValueError, KeyError, TypeError):
            fits = False
        self._version, self._spans = (version, spans) if fits else (None, [])

    def missing(self, start: int, stop: int) -> list[Span]:
        """The holes in [start, stop)."""
        with self._lock:
            return list(_without([(start, stop)], self._spans))

    def drop(self, spans: Sequence[Span]) -> None:
        """Give back the room of these ranges; they are missing from now on.

        Raises:
            OSError: the file system frees no parts of files.
        """
        with self._lock:
            # First the record, lest a run that is killed in between takes the hole for data.
            self._spans = list(_without(self._spans, _merged(spans)))
            self._write_record()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                for start, stop in spans:
                    punch_hole(descriptor, start, stop)
            finally:
                os.close(descriptor)

    def keep_only(self, spans: Iterable[Span]) -> None:
        """Drop all but the header and ``spans``."""
        size = self._version.size if self._version else 0
        kept = _merged([(0, min(self._header_stop, size)), *spans])
        with self._lock:
            clean = self._swept and not list(_without(self._spans, kept))
        if not clean:
            self.drop(list(_without([(0, size)], kept)))
            self._swept = True

    def clear(self) -> None:
        """Drop all of the file, on any file system."""
        with self._lock:
            self._spans = []
            self._write_record()
            size = self._version.size if self._version else 0
            os.truncate(self.path, 0)
            os.truncate(self.path, size)

    def open_start(self) -> None:
        """Fetch the first bytes, unless they are here."""
        if self.missing(0, 8):
            self.fetch(0, _FIRST_BYTES)

    def open_header(self) -> None:
        """Fetch the header, unless it is here."""
        self.open_start()
        with open(self.path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        size = self._version.size if self._version else 0
        if length > min(MAX_HEADER_BYTES, size):
            raise CheckpointError(f"{self.url} claims a header of {length:,} bytes: it is not a safetensors file.")
        self._header_stop = min(8 + length, size)
        for hole in self.missing(0, self._header_stop):
            self.fetch(*hole)

    def fetch(self, start: int, stop: int, advance: Advance = lambda count: None) -> None:
        """Fetch [start, stop), or to the file's end, going on after an interruption from the last byte that arrived.

        Raises:
            HubError: an answer that is not what was asked for, or is of another version of the file.
            RangesUnsupportedError: the server sends whole files only.
        """
        position = start

        def attempt() -> None:
            nonlocal position, stop
            with self._answer(position, stop) as (chunks, answer_stop, size):
                stop = min(stop, size)
                first = position
                descriptor = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    for chunk in chunks:
                        if len(chunk) > answer_stop - position:
                            position = first  # nothing of such an answer counts
                            raise self._untrue(f"more than the {answer_stop - first:,} bytes that it announced")
                        _write_all(descriptor, chunk, position)
                        position += len(chunk)
                        advance(len(chunk))
                finally:
                    if position > first:
                        flush_data(descriptor)
                        self._add(first, position)
                    os.close(descriptor)
            if position < answer_stop:
                raise self._untrue(f"{position - first:,} of {answer_stop - first:,} bytes", transient=True)

        while position < stop:
            with_retries(attempt, is_safe=always)

    @contextmanager
    def _answer(self, start: int, stop: int) -> Iterator[tuple[Iterator[bytes], int, int]]:
        """The server's answer for [start, stop), checked but for its body: (chunks, where they end, file size)."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        limit_waits()
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", self.url, headers=headers) as response:
            hf_raise_for_status(response)
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            encoded = response.headers.get("Content-Encoding", "identity") != "identity"
            if response.status_code != 206 or found is None or encoded:
                raise RangesUnsupportedError(
                    f"{self.url} sends only whole files, although byte ranges were requested: run the same command "
                    "again, or give a local copy of the model with --base."
                )
            first, last, size = map(int, found.groups())
            expected = min(stop, size)
            if first != start or not first <= last < expected:
                raise self._untrue(f"bytes {first:,} to {last:,} where {start:,} to {expected - 1:,} were asked for")
            if last + 1 < expected and last + 1 - first < _LEAST_ANSWER:
                raise self._untrue(f"{last + 1 - first:,} of {expected - start:,} bytes", transient=True)
            self._pin(response, size)
            # Raw: what a decoder makes of a body has no limit. As it arrives: a break loses nothing.
            yield response.iter_raw(), last + 1, size

    def _pin(self, response: Any, size: int) -> None:
        """Hold the file to one version: its commit, its size, its ETag."""
        # The first answer is the Hub's own; what it redirects to, a store of large files, has ETags of its own.
        hub = response.history[0] if response.history else response
        commit = hub.headers.get("X-Repo-Commit", self._commit)
        if commit != self._commit:
            raise self._untrue(f"the file of commit {commit[:12]!r} where {self._commit[:12]} was asked for")
        linked = hub.headers.get("X-Linked-Size")
        if linked is not None and linked != str(size):
            raise self._untrue(f"a file of {size:,} bytes, which should have {linked[:19]}")
        etag = hub.headers.get("X-Linked-ETag") or hub.headers.get("ETag")
        version = _Version(size, etag and etag.removeprefix("W/").strip('"')[:200])
        with self._lock:
            if self._version == version:
                return
            if self._spans:  # bytes of two versions must not meet; the next run begins anew
                self._version, self._spans = None, []
                self._record.unlink(missing_ok=True)
                raise self._untrue("another version of the file than before")
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(descriptor, size)
            finally:
                os.close(descriptor)
            self._version = version

    def _add(self, start: int, stop: int) -> None:
        """Record that [start, stop) is on the disk."""
        with self._lock:
            self._spans = _merged([*self._spans, (start, stop)])
            self._write_record()

    def _write_record(self) -> None:
        assert self._version is not None  # known since the header was opened
        table = {"size": self._version.size, "etag": self._version.etag, "have": self._spans}
        replace_file(self._record, json.dumps(table).encode())

    def _untrue(self, what: str, *, transient: bool = False) -> HubError:
        """The error for an answer that is not what was asked for; ``transient``: worth another attempt."""
        error = HubError(
            f"{self.url} answered with {what}: run the same command again, and if that fails too, check HF_ENDPOINT "
            "and whether a proxy is in between."
        )
        error.transient = transient
        return error


def _write_all(descriptor: int, chunk: bytes, position: int) -> None:
    view = memoryview(chunk)
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _without(spans: Iterable[Span], holes: Sequence[Span]) -> Iterator[Span]:
    """What is left of ``spans``; both are sorted, and do not overlap."""
    for start, stop in spans:
        for hole_start, hole_stop in holes:
            if hole_stop <= start or hole_start >= stop:
                continue
            if hole_start > start:
                yield start, hole_start
            start = hole_stop
        if start < stop:
            yield start, stop
