"""The norms ‖W0‖ and random projections of a base model's weights, computed once and kept in the user's cache folder.

A LoRA needs nothing else of its base (``mapconv.algebra`` section 2), so that the second adapter on a base reads none
of the base's weights. The cache is keyed by the base's files (path, size, times of modification and change) and by
their headers: a base that changed has another key, and a cache file that is broken is made again, with a note.

``MAPCONV_CACHE`` names the folder, or is ``off``; without it, ``mapconv`` in the platform's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock

from filelock import FileLock

from mapconv.algebra.fingerprint import Fingerprint
from mapconv.algebra.norms import BLOCK_ELEMENTS
from mapconv.checkpoint.codecs.base import EncodedTensor
from mapconv.checkpoint.index import Checkpoint
from mapconv.checkpoint.reader import TensorReader
from mapconv.checkpoint.staging import replace_file
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.base_check import base_fault
from mapconv.placement.weights import PlacedModule, WeightView, weight_fingerprint
from mapconv.runtime.threads import in_order, worker_count

_CACHE_VERSION = 2
#: Seconds between two looks at a lock that another process holds.
_POLL = 0.02
#: Bases whose norms a process keeps at hand.
_KEPT = 8
_kept: OrderedDict[str, dict[str, Fingerprint]] = OrderedDict()
_lock = Lock()


def strange_weights(placed: PlacedAdapter) -> Iterator[tuple[PlacedModule, str]]:
    """The modules of a MAP adapter whose weight is not the one that it was made for, each with its ``base_fault``."""
    norms = BaseNorms(placed.target.checkpoint)
    with TensorReader() as reader:
        norms.load([item.weight for item in placed.modules], reader)
    for item in placed.modules:
        fault = None if item.scalars is None else base_fault(item.scalars, norms[item.weight])
        if fault is not None:
            yield item, fault


class BaseNorms:
    """‖W0‖ of weights of one base, and their projections: ``norms[weight]``, once ``load`` has been told which."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._base = checkpoint.folder
        self.notes: tuple[str, ...] = ()
        self._folder = cache_folder()
        self._key = _identity(checkpoint)
        self._table: dict[str, Fingerprint] = {} if self._folder is None else self._known()

    def __getitem__(self, weight: WeightView) -> Fingerprint:
        return self._table[weight.place]

    def missing(self, weights: Iterable[WeightView]) -> list[WeightView]:
        """Those that must be read for their norm."""
        return [weight for weight in weights if weight.place not in self._table]

    def load(self, weights: Iterable[WeightView], reader: TensorReader) -> None:
        """Have the norm of each weight: from the cache, or in one pass over those that it lacks.

        Several processes that meet a new base at once wait for the first of them.
        """
        missing = self.missing(weights)
        if not missing:
            return
        with self._alone():
            if self._folder is not None:
                self._table = self._table | self._read()
            missing = self.missing(missing)
            # One core for each weight, so that a sum does not depend on how many there are.
            workers = worker_count(16 * BLOCK_ELEMENTS)
            found = in_order(lambda weight: weight_fingerprint(weight, reader), missing, workers)
            self._table = self._table | dict(zip((weight.place for weight in missing), found, strict=True))
            if missing and self._folder is not None:
                self._write(self._table)
                self._keep(self._table)

    @property
    def _path(self) -> Path:
        assert self._folder is not None  # asked for only where there is a cache
        return self._folder / f"{self._key}.json"

    def _known(self) -> dict[str, Fingerprint]:
        with _lock:
            table = _kept.get(self._key)
        if table is None:
            table = self._read()
            self._keep(table)
        return table

    def _keep(self, table: dict[str, Fingerprint]) -> None:
        with _lock:
            _kept[self._key] = table
            _kept.move_to_end(self._key)
            while len(_kept) > _KEPT:
                _kept.popitem(last=False)

    def _read(self) -> dict[str, Fingerprint]:
        try:
            table = json.loads(self._path.read_bytes())
            found = {
                str(name): Fingerprint(float.fromhex(square), float.fromhex(projection))
                for name, (square, projection) in table["weights"].items()
            }
            if table["version"] != _CACHE_VERSION or not all(map(_plausible, found.values())):
                raise ValueError("other content")
        except OSError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            note = f"the cached norms in {self._path} are broken ({type(error).__name__}) and made again"
            self.notes = (note,)
            return {}
        return found

    def _write(self, table: dict[str, Fingerprint]) -> None:
        """Whole or not at all; a cache that cannot be written is not a reason to fail."""
        finite = {
            name: (found.square.hex(), found.projection.hex())
            for name, found in sorted(table.items())
            if _plausible(found)
        }
        text = json.dumps({"version": _CACHE_VERSION, "base": str(self._base), "weights": finite}, indent=1)
        with contextlib.suppress(OSError):
            replace_file(self._path, text.encode())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the base's lock among all processes of this user, where the cache folder can be had at all."""
        if self._folder is None:
            yield
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._folder / f"{self._key}.lock", poll_interval=_POLL)
            lock.acquire()
        except OSError:
            yield
            return
        try:
            yield
        finally:
            lock.release()


def cache_folder() -> Path | None:
    """Where norms are kept, or None if they are not."""
    named = os.environ.get("MAPCONV_CACHE")
    if named:
        return None if named == "off" else Path(named) / "norms"
    if sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "mapconv" / "norms"


def _plausible(found: Fingerprint) -> bool:
    return 0 <= found.square < math.inf and math.isfinite(found.projection)


def _identity(checkpoint: Checkpoint) -> str:
    """A name for the base's content, from what its files' headers and the file system say of them."""
    digest = hashlib.blake2b(digest_size=16)
    for file in checkpoint.files:
        # A base that stays on the Hub has holes in its file, but lies under the commit that it is a copy of.
        here = checkpoint.source is None
        known = (file.path.resolve(), file.signature) if here else (file.path.absolute(), "on the Hub")
        digest.update(repr((*known, sorted(file.metadata.items()))).encode("utf-8", "surrogateescape"))
        for ref in file.tensors:
            digest.update(f"{ref.name}\0{ref.dtype}\0{ref.shape}\0{ref.start}\n".encode())
            if isinstance(ref, EncodedTensor):
                # What the codes stand for is in the configuration too: the size of a block, a format's version.
                digest.update(repr(ref.encoding).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
