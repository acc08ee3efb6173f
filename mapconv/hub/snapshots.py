"""Files of a repository in the client's ordinary cache, held to their hashes when they come."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from mapconv.errors import HubError
from mapconv.files import open_regular
from mapconv.hub.client_errors import deepest, is_offline
from mapconv.hub.faults import ask_hub
from mapconv.hub.reference import HubReference

_SHA256 = re.compile(r"[0-9a-f]{64}")


def snapshot(reference: HubReference, patterns: Iterable[str], hint: str = "") -> Path:
    """Fetch the files that match, into the client's cache; the folder's name is the commit.

    ``hint`` ends the sentence of an error: what else the user may do.
    """
    from huggingface_hub import constants, snapshot_download

    from mapconv.hub.client import limit_waits, quiet_client

    prefix = f"{reference.subfolder}/" if reference.subfolder else ""
    wanted = [prefix + pattern for pattern in patterns]
    blobs = Path(constants.HF_HUB_CACHE, "models--" + reference.repo_id.replace("/", "--"), "blobs")
    before = _names_in(blobs)

    def fetch() -> str:
        limit_waits()
        return snapshot_download(reference.repo_id, revision=reference.revision, allow_patterns=wanted)

    with quiet_client():
        folder = ask_hub(
            fetch,
            str(reference),
            "read",
            hint=lambda error: hint,
        )
    _check_hashes(blobs, _names_in(blobs) - before, reference)
    return Path(folder, reference.subfolder or "")


def fetch_file(pinned: HubReference, name: str, hint: str = "") -> None:
    """Fetch one file of a commit into the client's cache, unless it is there; safe to call from several threads.

    ``hint`` as of ``snapshot``.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    from mapconv.hub.client import limit_waits, quiet_client

    where = {"repo_id": pinned.repo_id, "revision": pinned.revision}
    path = f"{pinned.subfolder}/{name}" if pinned.subfolder else name
    if isinstance(try_to_load_from_cache(filename=path, **where), str):
        return

    def fetch() -> str:
        limit_waits()
        try:
            return hf_hub_download(filename=path, **where)
        except LocalEntryNotFoundError as error:
            if is_offline(deepest(error)):
                # Other files of the commit are here: what the client says of a snapshot then is the better sentence.
                raise IncompleteSnapshotError(str(error), "") from error
            raise

    with quiet_client():
        blob = Path(os.path.realpath(ask_hub(fetch, str(pinned), "read", hint=lambda error: hint)))
    _check_hashes(blob.parent, {blob.name}, pinned)


def _names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _check_hashes(blobs: Path, names: set[str], reference: HubReference) -> None:
    """Hold the large files that were fetched to their SHA-256, which is the name that the Hub gives them in the cache.

    The client itself compares no more than their length.

    Raises:
        HubError: the content is another one; it is removed, so that the next run fetches it again.
    """
    for name in sorted(filter(_SHA256.fullmatch, names)):
        digest = hashlib.sha256()
        with open_regular(blobs / name, HubError) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != name:
            (blobs / name).unlink()
            raise HubError(
                f"{reference}: a file arrived damaged (its SHA-256 is {digest.hexdigest()[:12]}…, the Hub says "
                f"{name[:12]}…) and was removed from the cache: run the same command again."
            )
