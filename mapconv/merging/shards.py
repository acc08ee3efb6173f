"""A plan cut into its output files: what each needs of the base, and which bytes of the base nobody needs any more."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mapconv.adapter import TensorRef
from mapconv.hub.ranges import FileSpan
from mapconv.merging.plan import CopyJob, Job, MergeJob, MergePlan, OutputFile
from mapconv.placement.target_model import MergedBias


@dataclass(frozen=True)
class Shard:
    """One output file with all jobs that write into it.

    A weight's codes may have companions in another file: such a job is one of both files' jobs, and runs for each.
    """

    file: OutputFile
    jobs: tuple[Job, ...]

    @property
    def merged(self) -> tuple[MergeJob, ...]:
        """The changed tensors that are counted with this file: each with one."""
        return tuple(job for job in self.jobs if isinstance(job, MergeJob) and str(job.output) == self.file.name)

    @property
    def reads(self) -> list[FileSpan]:
        """What the jobs read of the base, as far as one pass over each tensor goes; the rest is read when needed."""
        return list(dict.fromkeys(span for job in self.jobs for span in _own_spans(job)))

    @property
    def original(self) -> Path | None:
        """The file of the base that this one is a copy of, byte for byte, or None."""
        if not all(isinstance(job, CopyJob) for job in self.jobs):
            return None
        copies = [job for job in self.jobs if isinstance(job, CopyJob)]
        sources = {job.source for job in copies}
        moved = any(job.source_offset != job.target_offset for job in copies)
        if len(sources) != 1 or moved:
            return None
        (source,) = sources
        if source.stat().st_size != self.file.nbytes:
            return None
        with open(source, "rb") as file:
            return source if file.read(len(self.file.header)) == self.file.header else None


def shards_of(plan: MergePlan) -> list[Shard]:
    """The plan's output files, in its order."""
    jobs: dict[str, list[Job]] = defaultdict(list)
    for job in plan.jobs:
        codes = job.codes if isinstance(job, MergeJob) else ()
        for name in dict.fromkeys([str(job.output), *(str(place.file) for place in codes)]):
            jobs[name].append(job)
    return [Shard(file, tuple(jobs[file.name])) for file in plan.files]


class Holding:
    """Counts for each byte of the base how many jobs still need it; safe to call from several threads."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        spans = [span for job in jobs for span in _all_spans(job)]
        ends: dict[Path, set[int]] = defaultdict(set)
        for file, start, stop in spans:
            ends[file] |= {start, stop}
        self._ends: Mapping[Path, list[int]] = {file: sorted(found) for file, found in ends.items()}
        self._needed = {file: [0] * len(found) for file, found in self._ends.items()}
        self._lock = threading.Lock()
        for span in spans:
            for number in self._pieces(span):
                self._needed[span[0]][number] += 1

    def done(self, job: Job) -> list[FileSpan]:
        """Count a job as done; the bytes that no other needs."""
        free: list[FileSpan] = []
        with self._lock:
            for span in _all_spans(job):
                file, ends = span[0], self._ends[span[0]]
                for number in self._pieces(span):
                    self._needed[file][number] -= 1
                    if self._needed[file][number] == 0:
                        free.append((file, ends[number], ends[number + 1]))
        return free

    def _pieces(self, span: FileSpan) -> range:
        """The numbers of the pieces, between neighbouring ends of all spans, that make up this one."""
        file, start, stop = span
        return range(bisect_left(self._ends[file], start), bisect_left(self._ends[file], stop))


def _own_spans(job: Job) -> Iterator[FileSpan]:
    if isinstance(job, CopyJob):
        yield job.source, job.source_offset, job.source_offset + job.nbytes
        return
    yield from _spans(job.source)


def _all_spans(job: Job) -> set[FileSpan]:
    """All that a job may read of the base, and of adapters: at least what it does read."""
    found = set(_own_spans(job))
    if isinstance(job, MergeJob):
        placed = [item.placed for item in job.updates]
        placed += [item.placed for item in job.biases if isinstance(item, MergedBias)]
        refs = [piece.tensor for item in placed for piece in item.weight.pieces]
        refs += [item.bias for item in placed if item.bias is not None]
        found.update(span for ref in refs for span in _spans(ref))
    return found


def _spans(ref: TensorRef) -> Iterator[FileSpan]:
    yield from ((part.file, part.start, part.stop) for part in ref.stored)
