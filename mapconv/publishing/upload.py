"""Send a package to the Hub: one commit with all of it, repeated where that is safe, and nothing where nothing changed.

A commit is either visible as a whole or not at all. It names its parent, so that a commit by somebody else in between
is noticed (412) and the card is written again from what the Hub has then. A second run after an interruption, or a
retry after a lost answer, compares file by file with what arrived, and makes no second commit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mapconv.errors import HubError
from mapconv.hub.client import Secret, limit_waits, quiet_client
from mapconv.hub.client_errors import never_arrived, status_of
from mapconv.hub.faults import ATTEMPTS, always, ask_hub, with_retries
from mapconv.hub.reference import is_repo_id
from mapconv.metadata.card import CARD_FILE
from mapconv.publishing.large_files import LargeFile, operations
from mapconv.publishing.package import Outgoing, Package

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LIBRARY = "mapconv"


@dataclass(frozen=True)
class Destination:
    """Where a package goes, and how."""

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str = "Upload with mapconv"


@dataclass(frozen=True)
class Sent:
    """What the Hub answered. ``changed`` is False where it had the same files already."""

    url: str
    commit: str
    commit_url: str
    pull_request: str | None
    created: bool
    changed: bool


def check_name(to: Destination) -> None:
    """Refuse what cannot be a repository's name.

    Raises:
        HubError: with the name.
    """
    if not is_repo_id(to.repo_id) or "/" not in to.repo_id:
        raise HubError(f"{to.repo_id!r} is not a repository name: give it as owner/name.")


def hub_api(token: Secret) -> HfApi:
    """The Hub's client, which writes with this token."""
    from huggingface_hub import HfApi

    from mapconv.version import __version__

    return HfApi(token=token.value(), library_name=LIBRARY, library_version=__version__)


def send(
    package: Package,
    to: Destination,
    token: Secret,
    *,
    stored: Mapping[str, LargeFile] = MappingProxyType({}),
    bars: bool | None = None,
) -> Sent:
    """Create the repository if need be, and commit the package.

    ``stored`` are those of its files, by their names, that were sent before (``large_files``).

    Raises:
        HubError: what the Hub or the network refuses, in one sentence.
    """
    api = hub_api(token)

    def may_have_opened(error: Exception) -> str:
        if not to.create_pr or status_of(error) in range(400, 500) or never_arrived(error):
            return ""
        return f"but look at {api.endpoint}/{to.repo_id}/discussions first: the pull request may have been opened"

    with quiet_client(bars=bars):
        created = ask_hub(lambda: ensure_repository(api, to), to.repo_id, "write")
        info, head = ask_hub(
            lambda: _commit_on_head(api, package, to, stored), to.repo_id, "write", hint=may_have_opened
        )
    where = f"{api.endpoint}/{to.repo_id}"
    return Sent(
        url=where if to.revision is None else f"{where}/tree/{to.revision}",
        commit=info.oid,
        commit_url=info.commit_url,
        pull_request=info.pr_url,
        created=created,
        changed=info.oid != head,
    )


def ensure_repository(api: Any, to: Destination) -> bool:
    """Make the repository, and the branch, unless they exist; whether the repository is new.

    Raises:
        HubError: ``private`` was asked for, and the repository is public already.
    """
    existing = _repository(api, to.repo_id)
    created = existing is None
    if existing is None:
        # A private wish goes out only where asked for: an organization may have its own default.
        _retried(lambda: api.create_repo(to.repo_id, private=True if to.private else None, exist_ok=True))
        existing = _retried(lambda: api.model_info(to.repo_id))
    if to.private and existing.private is False:
        raise HubError(
            f"{to.repo_id} exists already and is public, so --private would not hide it: make it private in its "
            "settings, or choose another name."
        )
    if to.revision is not None and not to.create_pr:
        _ensure_branch(api, to)
    return created


def _repository(api: Any, repo_id: str) -> Any:
    try:
        return _retried(lambda: api.model_info(repo_id))
    except Exception as error:
        # Missing, or hidden from this token: creating it tells which.
        if status_of(error) in (401, 404):
            return None
        raise


def _ensure_branch(api: Any, to: Destination) -> None:
    try:
        _retried(lambda: api.model_info(to.repo_id, revision=to.revision))
    except Exception as error:
        if status_of(error) != 404:
            raise
        _retried(lambda: api.create_branch(to.repo_id, branch=to.revision, exist_ok=True))


def _commit_on_head(api: Any, package: Package, to: Destination, stored: Mapping[str, LargeFile]) -> tuple[Any, str]:
    """Commit, and again on the new head where somebody else's commit came in between."""
    for _ in range(1, ATTEMPTS):
        try:
            return _commit(api, package, to, stored)
        except Exception as error:
            if status_of(error) != 412:
                raise
    return _commit(api, package, to, stored)


def _commit(api: Any, package: Package, to: Destination, stored: Mapping[str, LargeFile]) -> tuple[Any, str]:
    """Commit on top of the present head; returns the client's answer and that head.

    With a lost answer the whole call is repeated: files that arrived with it then count as unchanged. A pull request
    has no such memory, so it is repeated only where the Hub cannot have opened it.
    """
    from huggingface_hub import CommitOperationAdd

    there = _retried(lambda: api.model_info(to.repo_id, revision=to.revision))
    head = there.sha
    has_card = any(file.rfilename == CARD_FILE for file in there.siblings or ())
    card = package.card(to.repo_id, _remote_card(api, to.repo_id, head) if has_card else None).encode()
    files = [*package.files, Outgoing(CARD_FILE, package.folder / CARD_FILE, len(card), card)]
    files = [file for file in files if file.name not in stored]

    def attempt() -> Any:
        limit_waits()
        return api.create_commit(
            to.repo_id,
            # New objects each time: the client marks those that it has committed.
            [
                *operations(api, to.repo_id, to.revision, stored),
                *(CommitOperationAdd(file.name, file.content or str(file.path)) for file in files),
            ],
            commit_message=to.message,
            revision=to.revision,
            create_pr=to.create_pr,
            parent_commit=None if to.create_pr else head,
        )

    return with_retries(attempt, is_safe=never_arrived if to.create_pr else always), head


def _remote_card(api: Any, repo_id: str, commit: str) -> str:
    path = _retried(lambda: api.hf_hub_download(repo_id, CARD_FILE, revision=commit))
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def _retried(call: Callable[[], Any]) -> Any:
    limit_waits()
    return with_retries(call, is_safe=always)
