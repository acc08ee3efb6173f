"""A base model that stays on the Hub: only the headers, and the byte ranges that are asked for, come here.

What came is kept in a sparse local file of the remote file's size, each byte at its own offset, so that the rest of
mapconv reads it as an ordinary safetensors file. A record beside it lists the ranges that have arrived; a reader asks
for a range before it reads (``ByteSource``), so a hole is fetched then and is never taken for zeros.

The files lie in the client's assets cache (``HF_ASSETS_CACHE``), under a folder that is named as a cache snapshot is.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

from mapconv.adapter import TensorRef
from mapconv.checkpoint.index import INDEX_FILE, MAX_HEADER_BYTES, SINGLE_FILE, ByteSource, Checkpoint, read_checkpoint
from mapconv.errors import CheckpointError, HubError
from mapconv.hub.client import limit_waits
from mapconv.hub.faults import always, ask_hub, with_retries
from mapconv.hub.reference import HubReference, origin_of
from mapconv.runtime.progress import Advance, progress_bar

#: The first request for a file: the length of the header, and with most files all of it.
_FIRST_BYTES = 64 << 10
#: One request asks for at most this much, so that an interrupted fetch goes on near where it stopped.
_REQUEST_BYTES = 32 << 20
#: A gap between two ranges is fetched along if it is this small a part of the range after it: one request less.
_GAP = 1 / 20
_WORKERS = 4

Span = tuple[int, int]


class RangesUnsupportedError(HubError):
    """The server knows no byte ranges, or the weights are not where ranges help: fetch whole files instead."""


def ranged_checkpoint(reference: HubReference, snapshot: Path) -> Checkpoint:
    """The headers of a model on the Hub, with a source that fetches bytes of its tensors when they are read.

    Args:
        reference: the model.
        snapshot: its small files in the client's cache; its name is the commit, so the two cannot differ.

    Raises:
        RangesUnsupportedError: the server answers a range with the whole file. HubError, CheckpointError: as elsewhere.
    """
    pinned = origin_of(snapshot)
    folder = _lean_folder(pinned)
    folder.mkdir(parents=True, exist_ok=True)
    for path in snapshot.iterdir():
        link = folder / path.name
        if path.is_file() and not os.path.lexists(link):
            link.symlink_to(path.absolute())
    source = RangedSource(pinned, folder)
    ask_hub(source.open_headers, str(reference), "read")
    return replace(read_checkpoint(folder), source=source)


def prefetch(source: ByteSource | None, refs: Iterable[TensorRef], *, quiet: bool) -> None:
    """Fetch the tensors ``refs`` of a ranged checkpoint in as few requests as that takes; others need no fetching."""
    if isinstance(source, RangedSource):
        stored = [part for ref in refs for part in ref.stored if source.has(part.file)]
        source.fetch([(part.file, part.start, part.stop) for part in stored], quiet=quiet)


class RangedSource:
    """The remote files of one model (a ``ByteSource``); safe to call from several threads."""

    def __init__(self, pinned: HubReference, folder: Path) -> None:
        self._pinned, self._folder = pinned, folder
        self._files: dict[Path, _RangedFile] = {}
        self._lock = threading.Lock()

    def open_headers(self) -> None:
        """Fetch the header of the single weights file, or of every shard.

        Raises:
            RangesUnsupportedError: no byte ranges, or no weights that mapconv reads.
        """
        from huggingface_hub.errors import EntryNotFoundError

        with self._only_one():
            try:
                self._open(SINGLE_FILE)
                return
            except EntryNotFoundError:
                pass
            try:
                index = json.loads((self._folder / INDEX_FILE).read_bytes())
                names = sorted({os.path.basename(name) for name in index["weight_map"].values()})
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                raise RangesUnsupportedError("no safetensors weights") from None
            for name in names:
                self._open(name)

    def has(self, file: Path) -> bool:
        return file in self._files

    def require(self, file: Path, start: int, stop: int) -> None:
        remote = self._files.get(file)
        if remote is not None and remote.missing(start, stop):
            self.fetch([(file, start, stop)], quiet=True)

    def fetch(self, wanted: Sequence[tuple[Path, int, int]], *, quiet: bool) -> None:
        """Fetch what is missing of ``wanted``, with a bar in bytes."""
        with self._only_one():
            requests = []
            for file in dict.fromkeys(file for file, _, _ in wanted):
                spans = [(start, stop) for other, start, stop in wanted if other == file]
                remote = self._files[file]
                missing = [hole for span in join_spans(spans) for hole in remote.missing(*span)]
                requests += [(remote, part) for hole in missing for part in _parts(*hole)]
            if requests:
                ask_hub(lambda: _fetch_all(requests, quiet=quiet), str(self._pinned), "read")

    def _open(self, name: str) -> None:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self._pinned.repo_id, name, subfolder=self._pinned.subfolder, revision=self._pinned.revision)
        remote = _RangedFile(url, self._folder / name)
        remote.open_header()
        self._files[remote.path] = remote

    @contextmanager
    def _only_one(self) -> Iterator[None]:
        """One thread of one process at a time: two runs on the same base share what the first one fetches."""
        with self._lock, open(self._folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for remote in self._files.values():
                remote.read_record()
            yield


class _RangedFile:
    """One remote file and its sparse local twin."""

    def __init__(self, url: str, path: Path) -> None:
        self.url, self.path = url, path
        self._record = path.with_name(path.name + ".ranges.json")
        self._lock = threading.Lock()
        self.size, self._spans = 0, []
        self.read_record()

    def read_record(self) -> None:
        try:
            record = json.loads(self._record.read_bytes())
            if self.path.stat().st_size == record["size"]:
                self.size, self._spans = record["size"], [tuple(span) for span in record["have"]]
        except (OSError, ValueError, KeyError, TypeError):
            self.size, self._spans = 0, []

    def missing(self, start: int, stop: int) -> list[Span]:
        """The holes in [start, stop)."""
        holes = []
        with self._lock:
            for have_start, have_stop in self._spans:
                if have_stop <= start:
                    continue
                if have_start >= stop:
                    break
                if have_start > start:
                    holes.append((start, have_start))
                start = have_stop
        if start < stop:
            holes.append((start, stop))
        return holes

    def open_header(self) -> None:
        if not self.missing(0, 8):
            return
        self.fetch(0, _FIRST_BYTES)
        with open(self.path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if length > min(MAX_HEADER_BYTES, self.size):
            raise CheckpointError(f"{self.url} claims a header of {length:,} bytes: it is not a safetensors file.")
        for hole in self.missing(0, min(8 + length, self.size)):
            self.fetch(*hole)

    def fetch(self, start: int, stop: int, advance: Advance = lambda count: None) -> None:
        """Fetch [start, stop), going on after an interruption from the last byte that arrived."""
        position = start

        def attempt() -> None:
            nonlocal position
            first = position
            chunks = self._stream(first, stop)
            head = next(chunks, b"")  # the answer has begun, and the file is there
            with open(self.path, "r+b") as file:
                file.seek(first)
                try:
                    for chunk in chain([head], chunks):
                        file.write(chunk)
                        position += len(chunk)
                        advance(len(chunk))
                finally:
                    if position > first:
                        file.flush()
                        os.fdatasync(file.fileno())
                        self._add(first, position)

        with_retries(attempt, is_safe=always)

    def _stream(self, start: int, stop: int) -> Iterator[bytes]:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        limit_waits()
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", self.url, headers=headers) as response:
            hf_raise_for_status(response)
            total = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code != 206 or total is None:
                raise RangesUnsupportedError(f"{self.url} comes as a whole only")
            self._make_room(int(total[1]))
            yield from response.iter_bytes()  # as it arrives: what came before a break is not fetched again

    def _make_room(self, size: int) -> None:
        with self._lock:
            if self.size == size:
                return
            self.size, self._spans = size, []
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.truncate(descriptor, size)
            os.close(descriptor)

    def _add(self, start: int, stop: int) -> None:
        """Record that [start, stop) is on the disk."""
        with self._lock:
            self._spans = _merged([*self._spans, (start, stop)])
            temporary = self._record.with_suffix(".partial")
            temporary.write_text(json.dumps({"size": self.size, "have": self._spans}))
            temporary.replace(self._record)


def _fetch_all(requests: Sequence[tuple[_RangedFile, Span]], *, quiet: bool) -> None:
    total = sum(stop - start for _, (start, stop) in requests)
    with progress_bar(total, "fetching base", quiet=quiet) as advance, ThreadPoolExecutor(_WORKERS) as pool:
        jobs = [pool.submit(remote.fetch, *span, advance) for remote, span in requests]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def join_spans(spans: Iterable[Span]) -> list[Span]:
    """Ranges to ask for: neighbours in one, and small gaps along with them (at most ``_GAP`` of all bytes)."""
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and start - joined[-1][1] <= _GAP * (stop - start):
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _parts(start: int, stop: int) -> Iterator[Span]:
    for first in range(start, stop, _REQUEST_BYTES):
        yield first, min(first + _REQUEST_BYTES, stop)


def _lean_folder(pinned: HubReference) -> Path:
    from huggingface_hub import cached_assets_path

    owner = "models--" + pinned.repo_id.replace("/", "--")
    root = cached_assets_path(library_name="mapconv", namespace="ranges", subfolder=owner)
    return root / "snapshots" / pinned.revision / (pinned.subfolder or "")
