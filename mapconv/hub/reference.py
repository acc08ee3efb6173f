"""How a user names something on the Hub.

``owner/name``, with a branch, tag or commit as ``owner/name@revision``, and with a folder inside the repository as
``owner/name/sub/folder@revision`` or ``owner/name@revision:sub/folder``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

_SYNTAX = re.compile(
    r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?P<path>(?:/[^/@:\\]+)*)(?:@(?P<revision>[^@:\\]+))?(?::(?P<subfolder>[^@:\\]+))?"
)
#: A commit, which names the same files for ever.
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubReference:
    """A repository of the Hub; ``revision`` is a branch, a tag or a commit, None the main branch."""

    repo_id: str
    revision: str | None = None
    subfolder: str | None = None

    def __str__(self) -> str:
        path = f"{self.repo_id}/{self.subfolder}" if self.subfolder else self.repo_id
        return f"{path}@{self.revision}" if self.revision else path

    def split_file(self, ending: str) -> tuple[HubReference, str | None]:
        """The folder that a file of this ending lies in, and the file's name; None for what names no such file."""
        folder, _, file = (self.subfolder or "").rpartition("/")
        if not file.endswith(ending):
            return self, None
        return replace(self, subfolder=folder or None), file

    @property
    def name(self) -> str:
        """The last part of what the user sees: the subfolder's name, else the repository's."""
        return (self.subfolder or self.repo_id).rpartition("/")[2]


def parse_reference(text: str) -> HubReference | None:
    """Read a reference, or None for what cannot be one: an absolute path, ``./x``, ``~/x``, a name the Hub forbids."""
    match = _SYNTAX.fullmatch(text)
    if match is None or not is_repo_id(match["repo"]):
        return None
    subfolder = "/".join(part for part in (match["path"].strip("/"), (match["subfolder"] or "").strip("/")) if part)
    if any(part in ("", ".", "..") for part in subfolder.split("/") if subfolder):
        return None
    return HubReference(match["repo"], match["revision"], subfolder or None)


def is_repo_id(name: str) -> bool:
    """Whether the Hub allows this name: ``owner/name``, or one word as ``gpt2`` for a few old models."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "~"))


def shown(folder: Path) -> str:
    """A folder as the user knows it: a copy in the Hub's cache by its name and commit, any other by its path."""
    origin = origin_of(folder)
    if origin is None:
        return str(folder)
    assert origin.revision is not None  # a commit
    return str(replace(origin, revision=origin.revision[:12]))


def origin_of(folder: Path) -> HubReference | None:
    """What a folder of a Hub cache is a copy of (``models--owner--name/snapshots/COMMIT[/sub/folder]``), else None."""
    parts = folder.absolute().parts
    for position in range(len(parts) - 2, 0, -1):
        if parts[position] == "snapshots" and parts[position - 1].startswith("models--"):
            commit = parts[position + 1]
            if not COMMIT.fullmatch(commit):
                return None
            repo_id = parts[position - 1].removeprefix("models--").replace("--", "/")
            return HubReference(repo_id, commit, "/".join(parts[position + 2 :]) or None)
    return None
