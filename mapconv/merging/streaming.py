"""Write a plan's files one after the other, each gone before the next but one comes: room for two is enough.

The base may be on the Hub (``hub.ranges``). While a file is made, the bytes of the base that no job needs any more give
their room back, so that the two together take no more than the larger of them; the room of a second file is left for
what the next one reads, which is fetched meanwhile. Where the file system cannot free a part of a file, nothing is
fetched ahead: one file and its source have the room of two then.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mapconv.checkpoint.sparse import can_punch
from mapconv.hub.ranges import FileSpan, RangedSource
from mapconv.merging.merger import MergedTensor, Merger
from mapconv.merging.plan import Job, MergePlan
from mapconv.merging.shards import Holding, Shard
from mapconv.merging.writer import write_weights
from mapconv.runtime.threads import worker_count

log = logging.getLogger(__name__)

#: The base's bytes go back in portions of about this size, each of which is recorded on the disk.
PORTION = 16 << 20
#: The read-ahead asks for this much at a time, after which it can be stopped.
SLICE = 128 << 20


def room_for(shards: Sequence[Shard], *, whole_base: bool) -> int:
    """The most bytes on the disk at a time; ``whole_base``: the base is there in any case, and counts for nothing."""
    largest = [max(shard.file.nbytes, 0 if whole_base else _nbytes(shard.reads)) for shard in shards]
    return (1 if whole_base else 2) * max(largest, default=0)


def stream_shards(
    plan: MergePlan, shards: Sequence[Shard], folder: Path, *, recompute: bool, quiet: bool
) -> Generator[tuple[Shard, Path, tuple[MergedTensor, ...]], None, None]:
    """Yield each of ``shards`` when it is written, with its path and its merged tensors; it is removed afterwards.

    Raises:
        MapconvError: as ``write_weights``; HubError: the base cannot be fetched.
    """
    found = plan.target.checkpoint.source
    base = _Base(found if isinstance(found, RangedSource) else None, folder, room_for(shards, whole_base=False))
    with base:
        for number, shard in enumerate(shards):
            following = shards[number + 1] if number + 1 < len(shards) else None
            base.begin(shard, following, quiet=quiet)
            jobs = replace(plan, files=(shard.file,), jobs=shard.jobs)
            path = folder / shard.file.name
            path.unlink(missing_ok=True)
            # Room is taken as the base gives it back.
            merged = write_weights(jobs, folder, recompute=recompute, done=base.done, grows=True, quiet=quiet)
            log.info("wrote %s, %d bytes", shard.file.name, shard.file.nbytes)
            yield shard, path, tuple(item for item in merged if item.tensor in {job.name for job in shard.merged})
            path.unlink()
            base.end()


class _Base:
    """The base on the Hub (None: it is on this disk, and nothing is done) while shards are made of it."""

    def __init__(self, source: RangedSource | None, folder: Path, room: int) -> None:
        self._source, self._room = source, room
        self._frees = source is not None and can_punch(folder)
        self._thread: threading.Thread | None = None
        self._stop, self._failure = threading.Event(), None
        self._lock = threading.Lock()
        self._following: list[FileSpan] = []

    def __enter__(self) -> _Base:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def begin(self, shard: Shard, following: Shard | None, *, quiet: bool) -> None:
        """Have all that a shard reads, and start on that of the following one."""
        self._join()
        if self._source is None:
            return
        own, self._following = self._of_base(shard), self._of_base(following)
        # What a run that was killed had fetched for later, among others.
        self._give_back(own)
        self._source.fetch(own, quiet=quiet)
        log.info("fetched what %s is made of, %d bytes", shard.file.name, _nbytes(own))
        if not self._frees:
            return
        self._holding = Holding([*shard.jobs, *(following.jobs if following else ())])
        self._waiting: dict[Path, list[tuple[int, int]]] = defaultdict(list)
        workers = worker_count(Merger.WORKING_BYTES)
        # What the jobs at work have on both sides, and what waits to be given back.
        both = workers * max((job.nbytes for job in shard.jobs), default=0) + PORTION
        room = self._room - max(shard.file.nbytes, _nbytes(own)) - both
        ahead = _first(self._following, room)
        self._thread = threading.Thread(target=self._fetch_ahead, args=(ahead,), daemon=True)
        self._thread.start()

    def done(self, job: Job) -> None:
        """Give back what nobody needs after this job."""
        if self._source is None or not self._frees:
            return
        free = self._of(self._holding.done(job))
        with self._lock:
            for file, start, stop in free:
                self._waiting[file].append((start, stop))
            ready = [file for file, spans in self._waiting.items() if sum(b - a for a, b in spans) >= PORTION]
            portions = [(file, self._waiting.pop(file)) for file in ready]
        self._source.drop((file, start, stop) for file, spans in portions for start, stop in spans)

    def end(self) -> None:
        """The shard is gone: so is the rest of what it was made of."""
        self._give_back(self._following)

    def _give_back(self, kept: Sequence[FileSpan]) -> None:
        if self._source is None:
            return
        if self._frees:
            self._source.keep_only(kept)
        else:
            self._source.clear()

    def _fetch_ahead(self, spans: Sequence[FileSpan]) -> None:
        assert self._source is not None
        try:
            for portion in _slices(spans):
                if self._stop.is_set():
                    return
                self._source.fetch(portion, quiet=True)
        except Exception as error:
            self._failure = error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        if self._failure is not None:
            raise self._failure

    def _of_base(self, shard: Shard | None) -> list[FileSpan]:
        return [] if shard is None else self._of(shard.reads)

    def _of(self, spans: Sequence[FileSpan]) -> list[FileSpan]:
        """Those of the base's own files: a tensor may come from an adapter."""
        assert self._source is not None
        return [span for span in spans if self._source.has(span[0])]


def _first(spans: Sequence[FileSpan], nbytes: int) -> list[FileSpan]:
    """The spans from the first on that have ``nbytes`` in all; the last of them is cut."""
    found: list[FileSpan] = []
    for file, start, stop in sorted(spans):
        if nbytes <= 0:
            break
        found.append((file, start, min(stop, start + nbytes)))
        nbytes -= stop - start
    return found


def _slices(spans: Sequence[FileSpan]) -> Iterator[list[FileSpan]]:
    """The spans in portions of about ``SLICE`` bytes."""
    portion: list[FileSpan] = []
    for file, first, last in spans:
        for start in range(first, last, SLICE):
            portion.append((file, start, min(start + SLICE, last)))
            if _nbytes(portion) >= SLICE:
                yield portion
                portion = []
    if portion:
        yield portion


def _nbytes(spans: Sequence[FileSpan]) -> int:
    return sum(stop - start for _, start, stop in spans)
