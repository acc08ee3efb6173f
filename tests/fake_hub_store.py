"""What the fake Hub keeps: repositories with branches and commits, large objects, and what Xet clients stored."""

from __future__ import annotations

import hashlib
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

INITIAL_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its bytes, or for a large object only its hash and size."""

    size: int
    oid: str
    content: bytes | None = None
    sha256: str | None = None

    @classmethod
    def regular(cls, content: bytes) -> Blob:
        return cls(len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), content)

    @classmethod
    def large(cls, sha256: str, size: int) -> Blob:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(size, hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(), sha256=sha256)

    @property
    def no_op_oid(self) -> str:
        """What ``preupload`` answers, so that the client can leave out a file that has not changed."""
        return self.sha256 or self.oid


@dataclass
class Commit:
    sha: str
    parent: str | None
    summary: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A repository; ``readers`` None is public, else the users who may read it (a gated one says so in its error)."""

    name: str
    owner: str
    readers: set[str] | None = None
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: int = 0

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def commit(self, branch: str, parent: str | None, files: dict[str, Blob], summary: str) -> Commit:
        lines = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(files.items()))
        number = len(self.commits)
        sha = hashlib.sha1(f"{self.name} {number} {parent} {summary}\n{lines}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, summary, files)
        self.branches[branch] = sha
        return self.commits[sha]


class Store:
    """Repositories and large objects, under one lock."""

    def __init__(self, xet_folder: Path) -> None:
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.xet_folder = xet_folder

    def create(self, name: str, owner: str, *, private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(name, owner, {owner} if private else None)
        repo.commit("main", None, {path: Blob.regular(data) for path, data in INITIAL_FILES.items()}, "initial commit")
        return repo

    def add_files(self, repo: Repo, files: dict[str, bytes], branch: str = "main") -> Commit:
        """Commit files as somebody else, without the client."""
        with self.lock:
            head = repo.resolve(branch) or repo.resolve("main")
            blobs = dict(head.files)
            for path, content in files.items():
                blobs[path] = self._blob(path, content)
            return repo.commit(branch, head.sha, blobs, "by somebody else")

    def content(self, blob: Blob) -> bytes | None:
        """The bytes of a file, or None where only Xet's chunk store has them."""
        return blob.content if blob.sha256 is None else self.objects.get(blob.sha256)

    def has_object(self, sha256: str) -> bool:
        return sha256 in self.objects or sha256 in self.xet_hashes()

    def xet_hashes(self) -> dict[str, str]:
        """Xet's own file hash by SHA-256, from the shards that hf_xet wrote into its ``local://`` store."""
        found: dict[str, str] = {}
        for shard in self.xet_folder.rglob("xorbs/shards/*.mdb"):
            found.update(_hashes_in_shard(shard.read_bytes()))
        return found

    def _blob(self, path: str, content: bytes) -> Blob:
        if not is_large(path, len(content)):
            return Blob.regular(content)
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects[sha256] = content
        return Blob.large(sha256, len(content))


def is_large(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".bin", ".pt")) or size > 10_000_000


def _hashes_in_shard(data: bytes) -> dict[str, str]:
    """Walk a shard's file section: 48-byte records, closed by one of 0xff (xet-core, ``mdb_shard``)."""
    found, position, width = {}, 48, 48
    while data[position : position + 32] not in (b"\xff" * 32, b""):
        file_hash = data[position : position + 32]
        flags, entries = struct.unpack_from("<II", data, position + 32)
        position += width * (1 + entries)
        if flags & 0x80000000:  # one verification record for each entry
            position += width * entries
        if flags & 0x40000000:  # a metadata record, which holds the SHA-256
            found[_hash_text(data[position : position + 32])] = _hash_text(file_hash)
            position += width
    return found


def _hash_text(raw: bytes) -> str:
    """Xet writes a hash as four little-endian numbers, each printed as hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))
