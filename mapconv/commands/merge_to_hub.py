"""A merge that goes to the Hub file by file, for models that this disk cannot hold: it has two of the files at most.

Each weights file is made, sent to the Hub's storage and removed; a ledger in the work folder says which are there, so
that the same command goes on after a kill. All becomes visible with one commit in the end, or nothing does.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from mapconv.adapter import Adapter
from mapconv.checkpoint.filenames import MERGE_RECORD
from mapconv.checkpoint.staging import write_file
from mapconv.checkpoint.unchanged import unchanged
from mapconv.checkpoint.writer import FixedFile
from mapconv.commands.merge_outcome import MergeResult, PushedModel, advice, check_base, saturation
from mapconv.commands.merge_preparation import MergeWish, Preparation, prepare
from mapconv.errors import DiskFullError, HubError, UnsupportedError
from mapconv.formats import read_adapter
from mapconv.hub.client import Secret, quiet_client
from mapconv.hub.faults import ask_hub
from mapconv.hub.locate import find_base
from mapconv.hub.reference import HubReference, origin_of, shown
from mapconv.merging.companions import write_companions
from mapconv.merging.merger import MergedTensor
from mapconv.merging.plan import MergeJob
from mapconv.merging.shards import Shard, shards_of
from mapconv.merging.streaming import room_for, stream_shards
from mapconv.metadata.provenance import source_fingerprint
from mapconv.publishing.large_files import in_storage, known_copy, send_file
from mapconv.publishing.package import Package, pack
from mapconv.publishing.upload import Destination, Sent, check_name, ensure_repository, hub_api, send
from mapconv.publishing.work_folder import Delivered, WorkFolder
from mapconv.version import __version__
from mapconv.wording import counted

log = logging.getLogger(__name__)
T = TypeVar("T")
#: What the Hub may answer to a commit that names a file which its storage has not got.
_NOT_FOUND = (400, 404, 422)


def merge_to_hub(
    wish: MergeWish,
    base: str | Path | None,
    to: Destination,
    *,
    work_dir: Path | None,
    license_: str | None,
    base_id: str | None,
    force: bool,
    dry_run: bool,
    quiet: bool,
) -> MergeResult:
    """Merge into ``base`` and publish the result; see :func:`mapconv.merge`.

    A dry run fetches headers alone: it knows what would be sent, and not what would survive.
    """
    started = time.perf_counter()
    check_name(to)
    with TemporaryDirectory(prefix="mapconv-") as temporary:
        place = Path(temporary) if dry_run else work_dir or _default_place()
        with WorkFolder(place, to.repo_id) as work:
            job = _HubMerge(wish, base, to, work, license_=license_, base_id=base_id, force=force, quiet=quiet)
            pushed = job.plan() if dry_run else job.run()
            merged = () if dry_run else tuple(job.merged)
            if not dry_run:
                work.remove()
    return MergeResult(
        **job.prepared.facts,
        out=None,
        merged=merged,
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        notes=(*job.notes, *advice(merged), *saturation(merged)),
        pushed=pushed,
    )


class _HubMerge:
    """One merge to the Hub; made, all that can be known without the weights is checked."""

    def __init__(
        self,
        wish: MergeWish,
        base: str | Path | None,
        to: Destination,
        work: WorkFolder,
        *,
        license_: str | None,
        base_id: str | None,
        force: bool,
        quiet: bool,
    ) -> None:
        self.to, self._work, self._force, self._quiet = to, work, force, quiet
        self._license, self._base_id = license_, base_id
        first = read_adapter(wish.sources[0], allow_pickle=wish.allow_pickle)
        found = _found(base, first, wish.sources[0])
        pinned = work.pinned(found) if isinstance(found, HubReference) else found
        self.prepared = prepare(wish, pinned, fetch="ranges", root=work.base)
        work.begin(_run(self.prepared, found, to))
        self.notes = self.prepared.notes
        if work.delivered:
            files = counted(len(self.prepared.plan.files), "weights file")
            self.notes.append(f"went on after {len(work.delivered)} of {files}, which an earlier run had sent")
        target = self.prepared.plan.target
        if target.checkpoint.models or target.checkpoint.is_file:
            what = "a pipeline of several models" if target.checkpoint.models else "a single file"
            raise UnsupportedError(
                f"{shown(target.folder)} is {what}, and --push-to sends one model with its configuration: merge it "
                "into --out."
            )
        self._shards = shards_of(self.prepared.plan)
        self._source = target.checkpoint.source
        self._write_companions()
        self._pack().card(to.repo_id)

    @property
    def merged(self) -> list[MergedTensor]:
        """Of all files that are sent, in the plan's order."""
        found = {item.tensor: item for one in self._work.delivered.values() for item in one.merged}
        names = [job.name for job in self.prepared.plan.jobs if isinstance(job, MergeJob)]
        return [found[name] for name in names if name in found]

    def plan(self) -> PushedModel:
        """What would be sent."""
        weights = tuple(shard.file.name for shard in self._shards)
        package = self._pack()
        others = tuple(sorted({file.name for file in package.files if file.name not in weights} | {"README.md"}))
        return PushedModel(self.to.repo_id, weights, (), others, license=_license_of(package, self.to.repo_id))

    def run(self) -> PushedModel:
        """Send all files, and commit."""
        created = self._ask(lambda api: ensure_repository(api, self.to))
        with unchanged(self.prepared.signatures):
            self._deliver()
            sent = self._commit()
        taken = tuple(name for name, one in self._work.delivered.items() if not one.sent)
        return replace(
            self.plan(),
            taken_over=taken,
            url=sent.url,
            commit=sent.commit,
            commit_url=sent.commit_url,
            created=created or sent.created,
            changed=sent.changed,
        )

    def _deliver(self) -> None:
        """Have every weights file in the Hub's storage."""
        self._take_over()
        pending = [shard for shard in self._shards if shard.file.name not in self._work.delivered]
        self._require_room(pending)
        plan, recompute = self.prepared.plan, self.prepared.wish.recompute
        try:
            stream = stream_shards(plan, pending, self._work.shards, recompute=recompute, quiet=self._quiet)
            with closing(stream):
                for shard, path, merged in stream:
                    check_base(self.prepared.placed, [*self.merged, *merged], force=self._force, so_far=True)
                    self._send(shard.file.name, path, merged)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFullError(
                f"there is no room left in {self._work.folder}, which needs that of two weights files "
                f"({room_for(pending, whole_base=self._source is None):,} bytes): free some space and run the same "
                f"command again, which goes on after {len(self._work.delivered)} of {len(self._shards)} files."
            ) from None

    def _take_over(self) -> None:
        """Leave on the Hub what is the base's there, byte for byte, and in its storage."""
        pending = [shard for shard in self._shards if shard.file.name not in self._work.delivered]
        copies = {shard.file.name: known_copy(shard, self._source) for shard in pending}
        files = {name: file for name, file in copies.items() if file is not None}
        for name in sorted(self._ask(lambda api: in_storage(api, self.to.repo_id, files))):
            log.info("%s is the base's, and on the Hub already", name)
            self._work.add(name, Delivered(files[name], sent=False))

    def _send(self, name: str, path: Path, merged: Sequence[MergedTensor]) -> None:
        file = self._ask(lambda api: send_file(api, self.to.repo_id, self.to.revision, name, path))
        self._work.add(name, Delivered(file, sent=True, merged=tuple(merged)))
        log.info("sent %s, %d of %d", name, len(self._work.delivered), len(self._shards))

    def _commit(self) -> Sent:
        """Commit all files; those that the Hub has lost by then are made and sent once more."""
        lost: set[str] = set()
        while True:
            accepted = check_base(self.prepared.placed, self.merged, force=self._force)
            self._write_record(self.merged)
            stored = {name: one.file for name, one in self._work.delivered.items()}
            try:
                bars = False if self._quiet else None
                sent = send(self._pack(), self.to, Secret(None), stored=stored, bars=bars)
                self.notes += accepted
                return sent
            except HubError as error:
                if error.status not in _NOT_FOUND:
                    raise
                missing = stored.keys() - self._ask(lambda api, files=stored: in_storage(api, self.to.repo_id, files))
                if not missing:
                    raise
                again = sorted(missing & lost)
                if again:
                    raise HubError(
                        f"the Hub took {again[0]} for {self.to.repo_id} twice and has lost it twice: run the same "
                        "command again later, which sends what is missing."
                    ) from None
                lost |= missing
                log.info("the Hub has lost %s: making it again", ", ".join(sorted(missing)))
                self._work.forget(missing)
            self._deliver()

    def _write_companions(self) -> None:
        """All but the weights, and of these the headers in files of no room, so that the result is a model's folder."""
        result, plan = self._work.result, self.prepared.plan
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir()
        for file in plan.files:
            FixedFile(result / file.name, file.header, file.nbytes, grows=True).close()
        wish = self.prepared.wish
        self.notes += write_companions(plan, wish.sources[0], result, wish.dtype, copied=wish.in_codes)
        self._write_record([])

    def _write_record(self, merged: Sequence[MergedTensor]) -> None:
        write_file(self._work.result / MERGE_RECORD, json.dumps(self.prepared.record(merged), indent=2) + "\n")

    def _pack(self) -> Package:
        return pack(self._work.result, base_id=self._base_id, license_=self._license)

    def _require_room(self, pending: Sequence[Shard]) -> None:
        needed = room_for(pending, whole_base=self._source is None)
        own = sum(path.lstat().st_blocks * 512 for path in self._work.folder.rglob("*"))
        free = shutil.disk_usage(self._work.folder).free
        if needed > free + own:
            raise DiskFullError(
                f"{self._work.folder} needs {needed:,} bytes, the room of two weights files, but only {free + own:,} "
                "are free there: free some space, choose another --work-dir, or give a smaller --max-shard-size."
            )

    def _ask(self, call: Callable[[Any], T]) -> T:
        api = hub_api(Secret(None))
        with quiet_client(bars=False if self._quiet else None):
            return ask_hub(lambda: call(api), self.to.repo_id, "write")


def _found(base: str | Path | None, adapter: Adapter, source: Path) -> Path | HubReference:
    return find_base(base, adapter.base, adapter.revision, source)


def _run(prepared: Preparation, base: Path | HubReference, to: Destination) -> dict[str, Any]:
    """What decides the bytes of the weights files, and where they go: the work folder's ledger is for this alone."""
    wish, checkpoint = prepared.wish, prepared.plan.target.checkpoint
    origin = origin_of(checkpoint.folder)
    local = {path.name: [known.size, known.modified] for path, known in checkpoint.signatures.items()}
    return {
        "adapters": [[str(source), source_fingerprint(source)] for source in wish.sources],
        "base": str(base),
        "commit": local if origin is None else origin.revision,
        "to": to.repo_id,
        "revision": to.revision,
        "weights": wish.weights,
        "dtype": wish.dtype,
        "max_shard_size": wish.max_shard_size,
        "quantized": wish.quantized,
        "scales": wish.scales,
        "lift": wish.lift,
        "dora_axis": wish.dora.axis,
        "dora_norm": wish.dora.norm,
        "mapconv": __version__,
    }


def _license_of(package: Package, repo_id: str) -> str | None:
    from huggingface_hub import ModelCard

    return ModelCard(package.card(repo_id)).data.license  # pyright: ignore[reportAttributeAccessIssue]: set from the YAML


def _default_place() -> Path:
    from huggingface_hub import cached_assets_path

    return cached_assets_path(library_name="mapconv", namespace="merges", subfolder="work")
