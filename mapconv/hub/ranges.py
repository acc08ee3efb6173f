"""A base model that stays on the Hub: only the headers, and the byte ranges that are asked for, come here.

What came is kept in a sparse local file of the remote file's size, each byte at its own offset, so that the rest of
mapconv reads it as an ordinary safetensors file. A record beside it lists the ranges that have arrived; a reader asks
for a range before it reads (``ByteSource``), so a hole is fetched then and is never taken for zeros.

The files lie in the client's assets cache (``HF_ASSETS_CACHE``), under a folder that is named as a cache snapshot is.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from mapconv.adapter import TensorRef
from mapconv.checkpoint.filenames import STEMS, weights_files
from mapconv.checkpoint.gguf.model import part_names
from mapconv.checkpoint.index import ByteSource, Checkpoint, read_checkpoint
from mapconv.checkpoint.staging import replace_file
from mapconv.errors import CheckpointError, HubError
from mapconv.files import LARGE, read_bytes
from mapconv.hub.faults import ask_hub
from mapconv.hub.ranged_file import RangedFile, RangesUnsupportedError, Span
from mapconv.hub.reference import HubReference, origin_of
from mapconv.jsonfile import read_object
from mapconv.runtime.progress import progress_bar

#: One request asks for at most this much, so that an interrupted fetch goes on near where it stopped.
_REQUEST_BYTES = 32 << 20
#: A gap between two ranges is fetched along if it is this small a part of the range after it: one request less.
_GAP = 1 / 20
_WORKERS = 4
#: What the cache may have of the weights themselves; no small files.
_WEIGHTS = (".safetensors", ".gguf", ".bin")

#: Bytes [start, stop) of a file.
FileSpan = tuple[Path, int, int]


def ranged_checkpoint(
    reference: HubReference,
    snapshot: Path,
    file: str | None = None,
    *,
    parts: Sequence[str] = ("",),
    root: Path | None = None,
) -> Checkpoint:
    """The headers of a model on the Hub, with a source that fetches bytes of its tensors when they are read.

    Args:
        reference: the model.
        snapshot: its small files in the client's cache; its name is the commit, so the two cannot differ.
        file: the one file that it is, of GGUF or of safetensors under a name of its own.
        parts: of a pipeline, the folders that may hold its models.
        root: the folder to keep it in; None: the client's assets cache, where other commands find it again.

    Raises:
        RangesUnsupportedError: the server answers a range with the whole file. HubError, CheckpointError: as elsewhere.
    """
    pinned = origin_of(snapshot)
    assert pinned is not None  # a snapshot lies in the client's cache
    folder = own_folder(_lean_folder(pinned, root))
    # A repository of GGUF files alone has nothing small, and so no snapshot.
    for path in snapshot.rglob("*") if snapshot.is_dir() else ():
        if path.is_file() and path.suffix not in _WEIGHTS:
            # A copy: a link would leave this folder, and the cache's blob may go before it does.
            content = read_bytes(path, CheckpointError, limit=LARGE, folder=snapshot)
            replace_file(folder / path.relative_to(snapshot), content)
    source = RangedSource(pinned, folder)
    if file is None:
        ask_hub(lambda: source.open_headers(parts), str(reference), "read")
        return read_checkpoint(folder, source)
    is_plain = file.endswith(".safetensors")
    names = [file] if is_plain else part_names(file)
    ask_hub(lambda: source.open_files(names, header=is_plain), str(reference), "read")
    return read_checkpoint(folder / file, source)


def prefetch(source: ByteSource | None, refs: Iterable[TensorRef], *, quiet: bool) -> None:
    """Fetch the tensors ``refs`` of a ranged checkpoint in as few requests as that takes; others need no fetching."""
    if isinstance(source, RangedSource):
        stored = [part for ref in refs for part in ref.stored if source.has(part.file)]
        source.fetch([(part.file, part.start, part.stop) for part in stored], quiet=quiet)


class RangedSource:
    """The remote files of one model (a ``ByteSource``); safe to call from several threads."""

    def __init__(self, pinned: HubReference, folder: Path) -> None:
        self._pinned, self.folder = pinned, folder
        self._files: dict[Path, RangedFile] = {}
        self._lock = threading.Lock()

    def open_headers(self, parts: Sequence[str] = ("",)) -> None:
        """Fetch the header of the single weights file, or of every shard, in each of these folders that has weights.

        Raises:
            RangesUnsupportedError: no byte ranges, or no weights that mapconv reads.
        """
        with self._only_one():
            if not [part for part in parts if self._open_weights(f"{part}/" if part else "")]:
                raise RangesUnsupportedError("no safetensors weights")

    def _open_weights(self, prefix: str) -> bool:
        """Whether a folder has weights, whose headers are then here."""
        from huggingface_hub.errors import EntryNotFoundError

        for single, index in map(weights_files, STEMS):
            try:
                self._open(prefix + single)
                return True
            except EntryNotFoundError:
                if not (self.folder / (prefix + index)).exists():
                    continue
            for name in self._shards(prefix + index):
                self._open(prefix + name)
            return True
        return False

    def open_files(self, names: Sequence[str], *, header: bool = False) -> None:
        """Fetch the first bytes of these files, or all of their ``header``; more of a GGUF file's as it is read.

        Raises:
            RangesUnsupportedError: no byte ranges, or no such file.
        """
        from huggingface_hub.errors import EntryNotFoundError

        with self._only_one():
            for name in names:
                try:
                    self._open(name, header=header)
                except EntryNotFoundError:
                    raise RangesUnsupportedError(f"no file {name}") from None

    def _shards(self, index: str) -> list[str]:
        try:
            table = read_object(self.folder / index, CheckpointError, limit=LARGE)
            return sorted({os.path.basename(name) for name in table["weight_map"].values()})
        except (OSError, CheckpointError, KeyError, TypeError, AttributeError):
            raise RangesUnsupportedError("no safetensors weights") from None

    def has(self, file: Path) -> bool:
        return file in self._files

    def require(self, file: Path, start: int, stop: int) -> None:
        remote = self._files.get(file)
        if remote is not None and remote.missing(start, stop):
            self.fetch([(file, start, stop)], quiet=True)

    def sha256(self, file: Path) -> str | None:
        """The hash of a whole file, where the Hub says it."""
        return self._files[file].sha256

    def drop(self, spans: Iterable[FileSpan]) -> None:
        """Give back the room of these ranges, on a file system that can (``checkpoint.sparse.can_punch``)."""
        by_file: dict[Path, list[Span]] = defaultdict(list)
        for file, start, stop in spans:
            by_file[file].append((start, stop))
        for file, found in by_file.items():
            self._files[file].drop(found)

    def keep_only(self, spans: Iterable[FileSpan]) -> None:
        """Give back the room of all but the headers and these ranges."""
        kept = list(spans)
        for file, remote in self._files.items():
            remote.keep_only((start, stop) for other, start, stop in kept if other == file)

    def clear(self) -> None:
        """Give back the room of all files, on any file system."""
        for remote in self._files.values():
            remote.clear()

    def fetch(self, wanted: Sequence[FileSpan], *, quiet: bool) -> None:
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

    def _open(self, name: str, *, header: bool = True) -> None:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self._pinned.repo_id, name, subfolder=self._pinned.subfolder, revision=self._pinned.revision)
        assert self._pinned.revision is not None  # a commit
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        remote = RangedFile(url, self.folder / name, self._pinned.revision)
        if header:
            remote.open_header()
        else:
            remote.open_start()
        self._files[remote.path] = remote

    @contextmanager
    def _only_one(self) -> Iterator[None]:
        """One thread of one process at a time: two runs on the same base share what the first one fetches."""
        with self._lock, FileLock(self.folder / ".lock", mode=0o600, poll_interval=0.02):
            for remote in self._files.values():
                remote.read_record()
            yield


def _fetch_all(requests: Sequence[tuple[RangedFile, Span]], *, quiet: bool) -> None:
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


def _parts(start: int, stop: int) -> Iterator[Span]:
    for first in range(start, stop, _REQUEST_BYTES):
        yield first, min(first + _REQUEST_BYTES, stop)


def own_folder(folder: Path, advice: str = "set HF_ASSETS_CACHE to a folder of your own") -> Path:
    """Make the folder for this user alone: who can write in it could put other weights in the place of the model's.

    Raises:
        HubError: it is there, and another user's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder.stat().st_uid
    if folder.is_symlink() or owner != os.getuid():
        raise HubError(f"{folder} belongs to another user: {advice}.")
    folder.chmod(0o700)
    return folder


def _lean_folder(pinned: HubReference, root: Path | None) -> Path:
    from huggingface_hub import cached_assets_path

    assert pinned.revision is not None  # a commit
    owner = "models--" + pinned.repo_id.replace("/", "--")
    if root is None:
        place = cached_assets_path(library_name="mapconv", namespace="ranges", subfolder=owner)
    else:
        place = root / owner
    return place / "snapshots" / pinned.revision / (pinned.subfolder or "")
