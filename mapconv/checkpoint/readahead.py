"""Ask the system for what a command is going to read: while torch is still being imported, and before a job's turn.

These are hints: nothing is checked or reported here, because the command reads the same files with care a moment later.
What a hint costs is bounded, and a system that takes none (macOS has no ``posix_fadvise``) reads as it always does.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from mapconv.checkpoint.filenames import PIPELINE_FILE, STEMS, weights_files

Job = TypeVar("Job")

#: Bytes asked for in all: what a fast disk reads while torch is imported, and a small part of any machine's memory.
BUDGET = 1 << 30
#: Bytes that are asked for before the turn of the jobs that read them.
AHEAD = 256 << 20
#: A longer header is left to the command: to parse it here would hold up the imports.
_LONGEST_HEADER = 16 << 20
#: Ranges with a smaller gap between them are asked for as one.
_GAP = 1 << 20
#: For one hint Linux reads no more than a device's read-ahead window (``force_page_cache_ra`` in its mm/readahead.c),
#: which has this size unless somebody has enlarged it. Of what is there already, a hint costs a few microseconds.
_WINDOW = 128 << 10
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_ahead(adapters: Sequence[str | Path], base: str | Path | None, *, whole_base: bool) -> threading.Thread:
    """Start to read local adapters and what they need of their base: its headers, and the weights that a DoRA adapts.

    Args:
        adapters: folders or files; what is none (a name on the Hub) is passed over.
        base: the base model's folder or file; None: the one that an adapter's configuration names.
        whole_base: read all of the base's weights ahead, for a command that runs or rewrites the model.
    """
    thread = threading.Thread(target=_run, args=(adapters, base, whole_base), daemon=True)
    thread.start()
    return thread


def reading_ahead(jobs: Iterable[Job], ranges: Callable[[Job], Iterable[tuple[Path, int, int]]]) -> Iterator[Job]:
    """Hand on jobs in their order, while a thread asks the system for what the next ones read.

    The system sees by itself what one reader wants next, but not what several workers want that read one file at
    several places.

    Args:
        ranges: of a job: the files that it reads, and the first byte in each and the one behind the last.
    """
    planned = list(jobs)
    ahead = _Ahead([list(ranges(job)) for job in planned])
    thread = threading.Thread(target=ahead.run, daemon=True)
    thread.start()
    try:
        for number, job in enumerate(planned):
            ahead.begin(number)
            yield job
    finally:
        ahead.begin(len(planned))
        thread.join()


class _Ahead:
    """Asks for the ranges of numbered jobs, at most ``AHEAD`` bytes further than the one that was begun last."""

    def __init__(self, ranges: Sequence[Sequence[tuple[Path, int, int]]]) -> None:
        # Of a range that is longer, the start: one reader's next bytes the system sees by itself.
        self._ranges = [[(file, start, min(stop, start + AHEAD)) for file, start, stop in spans] for spans in ranges]
        sizes = (sum(stop - start for _, start, stop in spans) for spans in self._ranges)
        self._before = [0, *accumulate(sizes)]
        self._begun, self._changed = 0, threading.Condition()

    def begin(self, number: int) -> None:
        with self._changed:
            self._begun = number
            self._changed.notify()

    def run(self) -> None:
        with ExitStack() as opened:
            descriptors: dict[Path, int] = {}
            for number, spans in enumerate(self._ranges):
                if not self._wait_for(number):
                    continue
                for file, start, stop in spans:
                    # The job itself says what is wrong with its files.
                    with suppress(OSError):
                        if file not in descriptors:
                            descriptors[file] = os.open(file, os.O_RDONLY)
                            opened.callback(os.close, descriptors[file])
                        _ask(descriptors[file], start, stop)

    def _wait_for(self, number: int) -> bool:
        """Whether a job is still to begin, as soon as it is near."""
        with self._changed:
            self._changed.wait_for(lambda: self._before[number] - self._before[self._begun] <= AHEAD)
            return self._begun <= number


def _run(adapters: Sequence[str | Path], base: str | Path | None, whole_base: bool) -> None:
    left = BUDGET
    # Whatever is wrong with these files, the command itself says it in a sentence.
    with suppress(Exception):
        for file, ranges in _needed([Path(adapter) for adapter in adapters], base, whole_base):
            left -= _advise(file, ranges, left)


def _needed(
    adapters: Sequence[Path], base: str | Path | None, whole_base: bool
) -> Iterator[tuple[Path, list[tuple[int, int]]]]:
    """Files, and the byte ranges of each that will be read: the adapters before their base, as a command has it."""
    adapted: set[str] = set()
    for adapter in adapters:
        if adapter.is_file():
            yield adapter, [(0, adapter.stat().st_size)]
            continue
        weights = adapter / _WEIGHTS
        if not weights.is_file() or not (adapter / _CONFIG).is_file():
            continue
        yield weights, [(0, weights.stat().st_size)]
        base = base or json.loads((adapter / _CONFIG).read_bytes()).get("base_model_name_or_path")
        adapted |= set() if whole_base else _rescaled_paths(_tensors(weights))
    for file in [] if base is None else _weights(Path(base)):
        if whole_base:
            yield file, [(0, file.stat().st_size)]
        elif file.suffix == ".safetensors":
            # Reading the header brings it into memory, which is all that a plain LoRA needs.
            tensors = _tensors(file).items()
            yield (
                file,
                [span for key, span in tensors if not adapted.isdisjoint(_spellings(key.removesuffix(".weight")))],
            )


def _weights(base: Path) -> Iterator[Path]:
    """The files of a model, or of all models of a pipeline, that have its weights, in the order of their names."""
    if base.is_file():
        yield base
        return
    pipeline = (base / PIPELINE_FILE).is_file()
    for folder in sorted(path for path in base.iterdir() if path.is_dir()) if pipeline else [base]:
        for stem in STEMS:
            single = folder / weights_files(stem)[0]
            files = [single] if single.is_file() else sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
            yield from files
            if files:
                break


def _rescaled_paths(tensors: Iterable[str]) -> set[str]:
    """The modules of a DoRA, as either spelling of a checkpoint may have them."""
    marked = [key.partition(".lora_magnitude_vector") for key in tensors]
    return {name for path, mark, _ in marked if mark for name in _spellings(path.removeprefix("base_model.model."))}


def _spellings(path: str) -> tuple[str, str]:
    """With and without the model's own prefix, which a checkpoint may leave out."""
    return path, path.partition(".")[2]


def _tensors(file: Path) -> dict[str, tuple[int, int]]:
    """The byte range of every tensor by name, as a safetensors header has it."""
    if not file.is_file():
        return {}
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _LONGEST_HEADER:
            return {}
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    starts = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + length + start, 8 + length + stop) for name, (start, stop) in starts.items()}


def _ask(descriptor: int, start: int, stop: int) -> None:
    """Have the system read these bytes of a file, where it takes hints."""
    if hasattr(os, "posix_fadvise"):
        for offset in range(start, stop, _WINDOW):
            os.posix_fadvise(descriptor, offset, min(_WINDOW, stop - offset), os.POSIX_FADV_WILLNEED)


def _advise(file: Path, ranges: list[tuple[int, int]], budget: int) -> int:
    """Have the system read these ranges of a file, ``budget`` bytes at most; returns how many."""
    asked = 0
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for start, stop in _joined(ranges):
            count = min(stop - start, budget - asked)
            if count <= 0:
                break
            _ask(descriptor, start, start + count)
            asked += count
    finally:
        os.close(descriptor)
    return asked


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1] + _GAP:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined
