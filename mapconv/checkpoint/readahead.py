"""Ask the system for what a command is going to read: while torch is still being imported, and before a job's turn.

These are hints: nothing is checked or reported here, because the command reads the same files with care a moment later.
What a hint costs is bounded, and a system that takes none (macOS has no ``posix_fadvise``) reads as it always does.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

Job = TypeVar("Job")

#: Bytes asked for in all: what a fast disk reads while torch is imported, and a small part of any machine's memory.
BUDGET = 1 << 30
#: Bytes that jobs have in the making before their turn.
AHEAD = 256 << 20
#: A longer header is left to the command: to parse it here would hold up the imports.
_LONGEST_HEADER = 16 << 20
#: Ranges with a smaller gap between them are asked for as one.
_GAP = 1 << 20
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_ahead(adapters: Sequence[str | Path], base: str | Path | None, *, whole_base: bool) -> threading.Thread:
    """Start to read local adapters and what they need of their base: its headers, and the weights that a DoRA adapts.

    Args:
        adapters: folders; what is none (a name on the Hub) is passed over.
        base: the base model's folder; None: the one that an adapter's configuration names.
        whole_base: read all of the base's weights ahead, for a command that runs or rewrites the model.
    """
    thread = threading.Thread(target=_run, args=(adapters, base, whole_base), daemon=True)
    thread.start()
    return thread


def reading_ahead(jobs: Iterable[Job], ranges: Callable[[Job], Iterable[tuple[Path, int, int]]]) -> Iterator[Job]:
    """Hand on jobs in their order, each some time after the system was asked for what it reads.

    The system sees by itself what one reader wants next, but not what several workers want that read one file at
    several places.

    Args:
        ranges: of a job: the files that it reads, and the first byte in each and the one behind the last.
    """
    waiting: deque[tuple[Job, int]] = deque()
    asked = 0
    with ExitStack() as opened:
        descriptors: dict[Path, int] = {}
        for job in jobs:
            size = 0
            for file, start, stop in ranges(job):
                count = min(stop - start, AHEAD)
                size += count
                # As above: the job itself says what is wrong with its files.
                with suppress(OSError, AttributeError):
                    if file not in descriptors:
                        descriptors[file] = os.open(file, os.O_RDONLY)
                        opened.callback(os.close, descriptors[file])
                    os.posix_fadvise(descriptors[file], start, count, os.POSIX_FADV_WILLNEED)
            waiting.append((job, size))
            asked += size
            while asked > AHEAD:
                first, size = waiting.popleft()
                asked -= size
                yield first
        while waiting:
            yield waiting.popleft()[0]


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
        weights = adapter / _WEIGHTS
        if not weights.is_file() or not (adapter / _CONFIG).is_file():
            continue
        yield weights, [(0, weights.stat().st_size)]
        base = base or json.loads((adapter / _CONFIG).read_bytes()).get("base_model_name_or_path")
        adapted |= set() if whole_base else _rescaled_paths(_tensors(weights))
    if base and whole_base and Path(base).suffix == ".gguf" and Path(base).is_file():
        yield Path(base), [(0, Path(base).stat().st_size)]
    if not base or not Path(base).is_dir():
        return
    for file in sorted(Path(base).glob("model*.safetensors")):
        if whole_base:
            yield file, [(0, file.stat().st_size)]
            continue
        # Reading the header brings it into memory, which is all that a plain LoRA needs.
        tensors = _tensors(file).items()
        yield file, [span for key, span in tensors if not adapted.isdisjoint(_spellings(key.removesuffix(".weight")))]


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


def _advise(file: Path, ranges: list[tuple[int, int]], budget: int) -> int:
    """Have the system read these ranges of a file, ``budget`` bytes at most; returns how many."""
    if not hasattr(os, "posix_fadvise"):
        return 0
    asked = 0
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for start, stop in _joined(ranges):
            count = min(stop - start, budget - asked)
            if count <= 0:
                break
            os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_WILLNEED)
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
