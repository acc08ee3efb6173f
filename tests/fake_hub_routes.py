"""What the fake Hub answers to each call, in the shapes that the client's own code reads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from tests.fake_hub_store import Blob, Commit, Repo, is_large

if TYPE_CHECKING:
    from tests.fake_hub import FakeHub, Request

WRITE_TOKEN, READ_TOKEN = "hf_WriteTokenOfTheTests0123456789abcd", "hf_ReadTokenOfTheTests0123456789abcdef"
USERS = {WRITE_TOKEN: ("me", "write"), READ_TOKEN: ("me", "read")}


class Answer(Exception):  # noqa: N818 (it is an answer, which may be a 200)
    """Ends a request from anywhere below the handler."""

    def __init__(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        self.status, self.headers = status, dict(headers or {})
        if isinstance(body, bytes | memoryview):
            self.body = body
        else:
            self.body = json.dumps({} if body is None else body).encode()
            self.headers.setdefault("Content-Type", "application/json")


def _error(status: int, code: str, message: str) -> Answer:
    return Answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})


class Routes:
    """What each call answers (shapes as in the client's own code)."""

    def __init__(self, hub: FakeHub, request: Request) -> None:
        self.hub, self.store, self.request = hub, hub.store, request
        lower = {name.lower(): value for name, value in request.headers.items()}
        self.token = lower.get("authorization", "").removeprefix("Bearer ") or None
        self.range = lower.get("range")

    def answer(self) -> Answer:
        method, path = self.request.method, self.request.path
        if path.startswith("/cdn/"):
            return self._cdn(path.removeprefix("/cdn/"))
        if self.token is not None and self.token not in USERS:
            return _error(401, "", "Invalid credentials in Authorization header")
        for route_method, pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and (method == route_method or (method, route_method) == ("HEAD", "GET")):
                return handler(self, *map(unquote, match.groups()))
        return Answer(404, {"error": f"no route {method} {path}"})

    def create(self) -> Answer:
        wanted = json.loads(self.request.body)
        user = self._writer(None)
        name = f"{wanted.get('organization') or user}/{wanted['name']}"
        with self.store.lock:
            if name in self.store.repos:
                return Answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            if name.partition("/")[0] != user:
                return _error(403, "", f"You don't have the rights to create a model under the namespace {name}")
            private = wanted.get("visibility") == "private" or wanted.get("private") is True
            self.store.create(name, user, private=private)
        return Answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate_yaml(self) -> Answer:
        content = json.loads(self.request.body)["content"]
        warnings = [] if content.startswith("---\n") else [{"message": "empty or missing yaml metadata in repo card"}]
        return Answer(200, {"errors": [], "warnings": warnings})

    def preupload(self, name: str, revision: str) -> Answer:
        repo = self._writable(name)
        files = (self._commit(repo, revision)).files
        answer = []
        for file in json.loads(self.request.body)["files"]:
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            known = {"oid": files[file["path"]].no_op_oid} if file["path"] in files else {}
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False} | known)
        return Answer(200, {"files": answer})

    def lfs_batch(self, name: str) -> Answer:
        self._writable(name)
        objects = []
        for item in json.loads(self.request.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if not self.store.has_object(item["oid"]):
                header, href = {}, f"{self.hub.cdn}/{item['oid']}"
                part = self.hub.part_size
                if part:
                    numbers = range(1, -(-item["size"] // part) + 1)
                    header = {"chunk_size": str(part)} | {f"{n:05d}": f"{href}?part={n}" for n in numbers}
                    href = f"{self.hub.url}/lfs-complete/{item['oid']}"
                verify = {"href": f"{self.hub.url}/lfs-verify/{name}"}
                entry["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            objects.append(entry)
        return Answer(200, {"transfer": "multipart" if self.hub.part_size else "basic", "objects": objects})

    def lfs_complete(self, oid: str) -> Answer:
        data = b"".join(content for _, content in sorted(self.hub.parts.pop(oid, {}).items()))
        return self._keep_object(oid, data)

    def lfs_verify(self, name: str) -> Answer:
        self._writable(name)
        item = json.loads(self.request.body)
        stored = self.store.objects.get(item["oid"])
        return Answer(200 if stored is not None and len(stored) == item["size"] else 404)

    def xet_token(self, name: str, kind: str, revision: str) -> Answer:
        self._writable(name) if kind == "write" else self._readable(name)
        url, expires = f"local://{self.store.xet_folder}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        return Answer(200, {"accessToken": "xet", "exp": expires, "casUrl": url}, headers)

    def commit(self, name: str, revision: str) -> Answer:
        repo = self._writable(name)
        lines = [json.loads(line) for line in self.request.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.store.lock:
            head = self._commit(repo, revision)
            opens_pr = "create_pr" in self.request.query
            if header.get("parentCommit", head.sha) != head.sha and not opens_pr:
                return _error(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = Blob.regular(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    if not self.store.has_object(value["oid"]):
                        return _error(400, "", f"LFS object {value['oid']} is not stored")
                    files[value["path"]] = Blob.large(value["oid"], value["size"])
                elif line["key"] == "deletedFile":
                    files.pop(value["path"])
            branch = revision
            if opens_pr:
                repo.pull_requests += 1
                branch = f"refs/pr/{repo.pull_requests}"
            made = repo.commit(branch, head.sha, files, header["summary"])
            answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{self.hub.url}/{name}/commit/{made.sha}"}
            if opens_pr:
                answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{repo.pull_requests}"
        return Answer(200, answer)

    def branch(self, name: str, branch: str) -> Answer:
        repo = self._writable(name)
        if branch in repo.branches:
            return Answer(409, {"error": "Reference already exists"})
        repo.branches[branch] = repo.branches["main"]
        return Answer(200)

    def info(self, name: str, revision: str = "main") -> Answer:
        repo = self._readable(name)
        commit = self._commit(repo, revision)
        files = [{"rfilename": path} for path in sorted(commit.files)]
        private = repo.readers is not None and not repo.gated
        return Answer(
            200, {"id": name, "sha": commit.sha, "private": private, "siblings": files, "gated": repo.gated, "tags": []}
        )

    def tree(self, name: str, revision: str) -> Answer:
        commit = self._commit(self._readable(name), revision)
        hashes = self.store.xet_hashes()
        entries = []
        for path, blob in sorted(commit.files.items()):
            entry = {"type": "file", "path": path, "oid": blob.oid, "size": blob.size}
            if blob.sha256:
                entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 132}
                if blob.sha256 in hashes:
                    entry["xetHash"] = hashes[blob.sha256]
            entries.append(entry)
        return Answer(200, entries)

    def resolve(self, name: str, revision: str, path: str) -> Answer:
        repo = self._readable(name)
        commit = self._commit(repo, revision)
        blob = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.sha}
        if blob is None:
            answer = _error(404, "EntryNotFound", "Entry not found")
            answer.headers.update(headers)
            return answer
        if blob.sha256 is None:
            return self._ranged(blob.content, headers | {"ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        headers["Location"] = f"{self.hub.cdn}/{blob.sha256}"
        xet_hash = self.store.xet_hashes().get(blob.sha256)
        if xet_hash:
            headers["X-Xet-Hash"] = xet_hash
            headers["X-Xet-Refresh-Route"] = f"{self.hub.url}/api/models/{name}/xet-read-token/{commit.sha}"
        return Answer(302, b"", headers | {"ETag": f'"{blob.oid}"'})

    def _cdn(self, oid: str) -> Answer:
        if self.token is not None:
            return Answer(400, b"a token has left the Hub")
        if self.request.method == "PUT":
            part = self.request.query.get("part")
            if part is None:
                return self._keep_object(oid, self.request.body)
            self.hub.parts.setdefault(oid, {})[int(part[0])] = self.request.body
            return Answer(200, b"", {"ETag": f'"part{part[0]}"'})
        content = self.store.objects.get(oid)
        return Answer(404, b"") if content is None else self._ranged(content, {"ETag": f'"{oid}"'})

    def _keep_object(self, oid: str, data: bytes) -> Answer:
        if hashlib.sha256(data).hexdigest() != oid:
            return Answer(400, b"these are other bytes than the hash says")
        self.store.objects[oid] = data
        return Answer(200, b"", {"ETag": f'"{oid}"'})

    def _ranged(self, content: bytes, headers: dict[str, str]) -> Answer:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.range or "")
        if not match or not self.hub.ranges:
            return Answer(200, content, headers)
        start, stop = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
        if start >= len(content):
            return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        return Answer(206, content[start:stop], headers | span)

    def _writer(self, repo: Repo | None) -> str:
        if self.token is None:
            raise _error(401, "RepoNotFound" if repo else "", "Invalid username or password.")
        user, role = USERS[self.token]
        if role != "write" or (repo is not None and repo.owner != user):
            raise _error(403, "", "Forbidden: you must use a write token to upload to a repository")
        return user

    def _readable(self, name: str) -> Repo:
        repo = self.store.repos.get(name)
        user = USERS[self.token][0] if self.token else None
        if repo is not None and repo.gated and user not in (repo.readers or ()):
            raise _error(403 if user else 401, "GatedRepo", f"Access to model {name} is restricted")
        if repo is None or (repo.readers is not None and user not in repo.readers):
            # The Hub hides what a caller may not see; without a token even a missing repository is a 401.
            raise _error(404 if user else 401, "RepoNotFound", "Repository not found")
        return repo

    def _writable(self, name: str) -> Repo:
        repo = self._readable(name)
        self._writer(repo)
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


_NAME = r"([^/]+/[^/]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", Routes.create),
    ("POST", r"/api/validate-yaml", Routes.validate_yaml),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", Routes.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Routes.lfs_batch),
    ("POST", r"/lfs-complete/(\w+)", Routes.lfs_complete),
    ("POST", rf"/lfs-verify/{_NAME}", Routes.lfs_verify),
    ("GET", rf"/api/models/{_NAME}/xet-(write|read)-token/(.+)", Routes.xet_token),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", Routes.commit),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", Routes.branch),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", Routes.tree),
    ("GET", rf"/api/models/{_NAME}/revision/([^/]+)", Routes.info),
    ("GET", rf"/api/models/{_NAME}", Routes.info),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", Routes.resolve),
]
