"""Large files on the Hub before the commit that makes them visible: sent one by one, and known by their hashes then."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapconv.checkpoint.index import ByteSource
from mapconv.errors import HubError
from mapconv.files import cached_blobs
from mapconv.hub.client import limit_waits
from mapconv.hub.faults import always, with_retries
from mapconv.hub.ranges import RangedSource
from mapconv.merging.shards import Shard

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class LargeFile:
    """A file in the Hub's storage of large files, which knows it by its SHA-256."""

    sha256: str
    nbytes: int


def send_file(api: HfApi, repo_id: str, revision: str | None, name: str, path: Path) -> LargeFile:
    """Send a file that a later commit will name; what the storage has already is not sent.

    Raises:
        HubError: the repository keeps files of this name in its commits themselves. Otherwise as the client raises.
    """
    from huggingface_hub import CommitOperationAdd

    def attempt() -> Any:
        limit_waits()
        operation = CommitOperationAdd(name, str(path))
        api.preupload_lfs_files(repo_id, [operation], revision=revision)
        return operation

    operation = with_retries(attempt, is_safe=always)
    if not operation._is_uploaded:
        raise HubError(
            f"{repo_id} does not take {name} as a large file: see its .gitattributes and .gitignore, or merge into a "
            "folder with --out and push that."
        )
    return LargeFile(operation.upload_info.sha256.hex(), operation.upload_info.size)


def in_storage(api: HfApi, repo_id: str, files: Mapping[str, LargeFile]) -> set[str]:
    """Those of ``files`` that need not be sent to the repository, because the storage has them."""
    from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
    from huggingface_hub.utils import build_hf_headers

    if not files:
        return set()

    def attempt() -> Any:
        limit_waits()
        return post_lfs_batch_info(
            [UploadInfo(size=file.nbytes, sample=b"", sha256=bytes.fromhex(file.sha256)) for file in files.values()],
            token=None,  # the one in the headers
            repo_type="model",
            repo_id=repo_id,
            endpoint=api.endpoint,
            headers=build_hf_headers(token=api.token, library_name=api.library_name),
        )

    found, _, _ = with_retries(attempt, is_safe=always)
    # The storage answers with what to do for each file: nothing, where it is there.
    there = {item["oid"] for item in found if item.get("actions") is None}
    return {name for name, file in files.items() if file.sha256 in there}


def operations(
    api: HfApi, repo_id: str, revision: str | None, files: Mapping[str, LargeFile]
) -> list[CommitOperationAdd]:
    """What a commit says of ``files`` in the storage; of those that the branch has already, nothing."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.lfs import UploadInfo

    if not files:
        return []
    there = {
        entry.path: entry.lfs.sha256
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision)
        if isinstance(entry, RepoFile) and entry.lfs is not None
    }
    made = []
    for name, file in files.items():
        if there.get(name) == file.sha256:
            continue
        operation = CommitOperationAdd(name, b"")
        # As the client leaves an operation whose file it has sent.
        operation.upload_info = UploadInfo(size=file.nbytes, sample=b"", sha256=bytes.fromhex(file.sha256))
        operation._upload_mode, operation._should_ignore, operation._is_uploaded = "lfs", False, True
        made.append(operation)
    return made


def known_copy(shard: Shard, source: ByteSource | None) -> LargeFile | None:
    """A file of the base on the Hub that the shard is a copy of, with the hash that the Hub knows it by."""
    original = shard.original
    if original is None:
        return None
    if isinstance(source, RangedSource):
        sha256 = source.sha256(original)
    else:
        # The client's cache names large files by their hashes.
        target = Path(os.path.realpath(original))
        sha256 = target.name if target.parent == cached_blobs(original.parent) else None
    if sha256 is None or not _SHA256.fullmatch(sha256):
        return None
    return LargeFile(sha256, shard.file.nbytes)
