"""A base model whose weights files come whole from the Hub, while those that are here already are read.

The headers come first, by byte ranges (``hub.ranges``), so that all which they tell is known before a file is fetched.
The files go into the client's ordinary cache, where every later run finds them. A reader that needs a file waits for
it (``ByteSource``), and the file that follows it in the model's order is then under way as well.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mapconv.checkpoint.headers import TensorFile, read_tensor_file
from mapconv.checkpoint.index import Checkpoint
from mapconv.errors import HubError
from mapconv.hub.ranges import RangedSource
from mapconv.hub.reference import HubReference, origin_of
from mapconv.hub.snapshots import fetch_file

#: Files that are fetched ahead of the one that is needed.
AHEAD = 1


def arriving_checkpoint(ranged: Checkpoint, snapshot: Path, hint: str = "") -> Checkpoint:
    """The same model with its weights in the client's cache, to which a file comes when it, or the one before, is read.

    Args:
        ranged: its headers (``ranged_checkpoint``), of a model in safetensors.
        snapshot: its small files in the client's cache, whose name is the commit.
        hint: as of ``snapshots.snapshot``.
    """
    source, pinned = ranged.source, origin_of(snapshot)
    assert isinstance(source, RangedSource)
    assert pinned is not None  # a snapshot lies in the client's cache
    found = _moved(ranged, source.folder, snapshot)
    return replace(found, source=ArrivingFiles(pinned, snapshot, found.files, hint))


class ArrivingFiles:
    """The files of one model, of which each is fetched once (a ``ByteSource``); safe to call from several threads.

    What is under way when nobody reads any more ends by itself: nothing is fetched that no reader asked for, but for
    ``AHEAD`` files.
    """

    def __init__(self, pinned: HubReference, folder: Path, files: Sequence[TensorFile], hint: str) -> None:
        self._pinned, self._folder, self._hint = pinned, folder, hint
        self._files = [_Arrival(file) for file in files]
        self._numbers = {arrival.expected.path: number for number, arrival in enumerate(self._files)}
        self._lock = threading.Lock()

    def require(self, file: Path, start: int, stop: int) -> None:
        """Return once the whole of ``file`` is in the cache.

        Raises:
            HubError: it cannot be fetched, or is not the file whose header was read.
        """
        number = self._numbers.get(file)
        if number is None or self._files[number].is_here:
            return
        with self._lock:
            for arrival in self._files[number : number + 1 + AHEAD]:
                if arrival.thread is None:
                    arrival.thread = threading.Thread(target=self._fetch, args=(arrival,), daemon=True)
                    arrival.thread.start()
        arrival = self._files[number]
        assert arrival.thread is not None
        arrival.thread.join()
        if arrival.failure is not None:
            raise arrival.failure
        arrival.is_here = True

    def _fetch(self, arrival: _Arrival) -> None:
        try:
            path = arrival.expected.path
            fetch_file(self._pinned, path.relative_to(self._folder).as_posix(), self._hint)
            found = [replace(ref, name="") for ref in read_tensor_file(path).tensors]
            # A model of a pipeline has other names here than in its file.
            if found != [replace(ref, name="") for ref in arrival.expected.tensors]:
                raise HubError(f"{path} is not the file whose header the Hub sent before: run the same command again.")
        except Exception as error:
            arrival.failure = error


class _Arrival:
    """One file on its way."""

    def __init__(self, expected: TensorFile) -> None:
        self.expected = expected
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None
        self.is_here = False


def _moved(checkpoint: Checkpoint, old: Path, new: Path) -> Checkpoint:
    """The same headers of files in another folder."""

    def moved(path: Path) -> Path:
        return new / path.relative_to(old)

    files = tuple(
        replace(file, path=moved(file.path), tensors=tuple(replace(ref, file=moved(ref.file)) for ref in file.tensors))
        for file in checkpoint.files
    )
    return replace(
        checkpoint,
        folder=moved(checkpoint.folder),
        files=files,
        tensors={ref.name: ref for file in files for ref in file.tensors},
        models=tuple(_moved(model, old, new) for model in checkpoint.models),
    )
