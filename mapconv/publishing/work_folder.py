"""Where a merge to the Hub works: room for two shards, and a ledger by which the next run goes on after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mapconv.algebra.fingerprint import Fingerprint
from mapconv.checkpoint.staging import replace_file
from mapconv.errors import OutputError
from mapconv.files import LARGE
from mapconv.hub.ranges import own_folder
from mapconv.hub.reference import HubReference
from mapconv.jsonfile import read_object
from mapconv.merging.merger import MergedTensor
from mapconv.merging.survival import Survival
from mapconv.publishing.large_files import LargeFile

_LEDGER = "ledger.json"
_OTHER = "choose another --work-dir"


@dataclass(frozen=True)
class Delivered:
    """A shard that the Hub's storage has: what it is there, whether it was ``sent``, and what was merged in it."""

    file: LargeFile
    sent: bool
    merged: tuple[MergedTensor, ...] = ()


class WorkFolder:
    """The folder of one merge in ``place``; use it as a context manager, which lets no second run in.

    ``base`` keeps what is read of the base, ``shards`` what is written, ``result`` all else of the merged model.
    """

    def __init__(self, place: Path, repo_id: str) -> None:
        self.folder = place / f"mapconv-merge-{repo_id.replace('/', '--')}"
        self.base, self.shards, self.result = (self.folder / name for name in ("base", "shards", "result"))
        self.delivered: dict[str, Delivered] = {}
        self._run: dict[str, Any] | None = None

    def __enter__(self) -> WorkFolder:
        own_folder(self.folder, _OTHER)
        self._lock = FileLock(self.folder / ".lock", mode=0o600)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(f"another run works in {self.folder}: wait until it ends, or {_OTHER}.") from None
        try:
            self._read()
        except BaseException:
            self._lock.release()
            raise
        self.shards.mkdir(exist_ok=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def pinned(self, base: HubReference) -> HubReference:
        """The base as the run found it that sent the first shard: a branch may have moved since."""
        known = self._run
        if known is None or not self.delivered or known["base"] != str(base) or not isinstance(known["commit"], str):
            return base
        return replace(base, revision=known["commit"])

    def begin(self, run: Mapping[str, Any]) -> None:
        """Take ``run``, which says what decides the shards' bytes, as this folder's, or go on with the same.

        Raises:
            OutputError: shards of a merge of another kind have been sent; the sentence says what differs.
        """
        new = json.loads(json.dumps(run))
        if self._run is None or not self.delivered:
            for found in self.base.glob("models--*/snapshots/*"):
                if found.name != new["commit"]:
                    shutil.rmtree(found, ignore_errors=True)
            self._run = new
            self._write()
            return
        known = self._run
        different = [name for name in new if known.get(name) != new[name]]
        if different:
            what = ", ".join(f"{name} is {_shown(known.get(name))}, not {_shown(new[name])}" for name in different)
            raise OutputError(
                f"{self.folder} holds an unfinished merge of another kind ({what}): repeat the command that began it, "
                f"or {_OTHER}."
            )

    def add(self, name: str, delivered: Delivered) -> None:
        """Record a shard that the Hub's storage has."""
        self.delivered[name] = delivered
        self._write()

    def forget(self, names: Iterable[str]) -> None:
        """Shards that the Hub has lost are made again."""
        for name in names:
            del self.delivered[name]
        self._write()

    def remove(self) -> None:
        """The merge is done: nothing of it stays here."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> None:
        try:
            table = read_object(self.folder / _LEDGER, OutputError, advice=f"remove {self.folder}", limit=LARGE)
        except FileNotFoundError:
            return
        try:
            self._run = {"base": None, "commit": None} | table["run"]
            self.delivered = {name: _delivered(item) for name, item in table["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise OutputError(
                f"{self.folder / _LEDGER} is not what mapconv wrote: remove {self.folder} to begin anew."
            ) from None

    def _write(self) -> None:
        files = {name: _table(item) for name, item in self.delivered.items()}
        replace_file(self.folder / _LEDGER, json.dumps({"run": self._run, "files": files}).encode())


def _table(item: Delivered) -> dict[str, Any]:
    merged = [
        {
            "tensor": one.tensor,
            "modules": one.modules,
            "dtype": one.dtype,
            "saturated": one.saturated,
            "survival": vars(one.survival),
            "base": [[identity, vars(print_)] for identity, print_ in one.base.items()],
        }
        for one in item.merged
    ]
    return {**vars(item.file), "sent": item.sent, "merged": merged}


def _delivered(table: Mapping[str, Any]) -> Delivered:
    merged = tuple(
        MergedTensor(
            tensor=one["tensor"],
            modules=tuple(one["modules"]),
            dtype=one["dtype"],
            survival=Survival(**one["survival"]),
            base={tuple(identity): Fingerprint(**print_) for identity, print_ in one["base"]},
            saturated=one["saturated"],
        )
        for one in table["merged"]
    )
    return Delivered(LargeFile(table["sha256"], table["nbytes"]), table["sent"], merged)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:297]}..."
