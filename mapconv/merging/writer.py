"""Run a plan's jobs into the files of a folder, several at once."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mapconv.checkpoint.flushing import BackgroundFlush
from mapconv.checkpoint.index import ByteSource
from mapconv.checkpoint.readahead import reading_ahead
from mapconv.checkpoint.reader import TensorReader
from mapconv.checkpoint.writer import FixedFile, NoFile
from mapconv.merging.merger import MergedTensor, Merger
from mapconv.merging.plan import CopyJob, Job, MergeJob, MergePlan
from mapconv.merging.rounding import Feedback
from mapconv.runtime.progress import progress_bar
from mapconv.runtime.threads import in_order, worker_count

log = logging.getLogger(__name__)

#: Jobs that run together, and what is known by then of their layers' inputs.
Group = tuple[Sequence[Job], Feedback | None]


def write_weights(
    plan: MergePlan,
    staging: Path | None,
    *,
    groups: Iterable[Group] | None = None,
    recompute: bool = False,
    done: Callable[[Job], None] = lambda job: None,
    grows: bool = False,
    quiet: bool,
) -> tuple[MergedTensor, ...]:
    """Write the plan's files into ``staging`` (None: into no files); the merged tensors in the plan's order.

    ``groups`` are the plan's jobs, where they have an order of their own; ``recompute`` as of ``Merger``; ``done`` is
    called with each job, by the thread that did it; ``grows`` as of ``FixedFile``.
    """
    total, source = sum(job.nbytes for job in plan.jobs), plan.target.checkpoint.source
    with (
        TensorReader(source) as reader,
        _output_files(plan, staging, grows) as files,
        BackgroundFlush() as flush,
    ):
        merger, merged = Merger(reader, files, plan.modules, recompute=recompute), {}
        with progress_bar(total, "merging", quiet=quiet) as advance:
            for jobs, feedback in [(plan.jobs, None)] if groups is None else groups:
                workers = worker_count(max([_working_bytes(job, feedback) for job in jobs], default=1))
                ahead = reading_ahead(jobs, _reads) if source is None else _arrived(jobs, source)
                results = in_order(partial(_run, merger, feedback, done), ahead, workers)
                for job, result in zip(jobs, results, strict=True):
                    advance(job.nbytes)
                    file = files[str(job.output)]
                    if isinstance(file, FixedFile):
                        flush.wrote(file.descriptor, job.nbytes)
                    if result is not None:
                        log.info("merged %s, %d bytes", result.tensor, job.nbytes)
                        merged[id(job)] = result
    return tuple(merged[id(job)] for job in plan.jobs if isinstance(job, MergeJob))


def _run(merger: Merger, feedback: Feedback | None, done: Callable[[Job], None], job: Job) -> MergedTensor | None:
    result = merger.run(job, feedback)
    done(job)
    return result


def _arrived(jobs: Iterable[Job], source: ByteSource) -> Iterator[Job]:
    """Hand on jobs in their order, each when what it reads is here: a user can interrupt who waits, and no worker."""
    for job in jobs:
        for file, start, stop in _reads(job):
            source.require(file, start, stop)
        yield job


def _reads(job: Job) -> list[tuple[Path, int, int]]:
    if isinstance(job, CopyJob):
        return [(job.source, job.source_offset, job.source_offset + job.nbytes)]
    return [(ref.file, ref.start, ref.stop) for ref in job.source.stored]


def _working_bytes(job: Job, feedback: Feedback | None) -> int:
    if isinstance(job, MergeJob) and job.codes:
        # A matrix as it is read, wanted and written, its levels, and what is measured.
        return 48 * job.source.numel // job.grid[0]
    if isinstance(job, MergeJob) and job.tuned_elements:
        return Merger.WORKING_BYTES + Merger.TUNED_BYTES * job.tuned_elements
    return Merger.WORKING_BYTES if feedback is None else feedback.WORKING_BYTES


@contextmanager
def _output_files(plan: MergePlan, staging: Path | None, grows: bool) -> Iterator[Mapping[str, FixedFile | NoFile]]:
    if staging is None:
        yield defaultdict(NoFile)
        return
    files: dict[str, FixedFile] = {}
    try:
        for file in plan.files:
            (staging / file.name).parent.mkdir(exist_ok=True)
            files[file.name] = FixedFile(staging / file.name, file.header, file.nbytes, grows=grows)
        # A weight's codes may have companions in a file that is not written now.
        yield defaultdict(NoFile, files)
    finally:
        for open_file in files.values():
            open_file.close()
