"""Publish a MAP adapter or a merged model on the Hub: pack, check, and send what changed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mapconv.hub.client import Secret
from mapconv.metadata.card import CARD_FILE
from mapconv.options.commands import PUSH
from mapconv.options.shared import MESSAGE
from mapconv.publishing.package import Kind, Package, pack
from mapconv.publishing.upload import Destination, check_name, send


@dataclass(frozen=True)
class PushedFile:
    """A file of the repository; ``note`` says where its bytes differ from the folder's."""

    name: str
    nbytes: int
    note: str


@dataclass(frozen=True)
class PushResult:
    """What was published, or with ``dry_run`` what would be (then without a commit).

    ``changed`` is False where the Hub had the same files already: then ``commit`` is the one that it had.
    """

    path: Path
    repo_id: str
    kind: Kind
    base: str
    base_revision: str | None
    source: str | None
    license: str | None
    files: tuple[PushedFile, ...]
    left_behind: tuple[str, ...]
    dry_run: bool
    url: str | None = None
    commit: str | None = None
    commit_url: str | None = None
    pull_request: str | None = None
    created: bool = False
    changed: bool = False

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path), "nbytes": self.nbytes}


class Push:
    """A push that is packed and checked, and not yet sent: what a user confirms."""

    def __init__(self, path: str | Path, to: Destination, *, license: str | None, base_id: str | None) -> None:
        check_name(to)
        self.to = to
        self.package: Package = pack(Path(path), base_id=base_id, license_=license)
        self._card = self.package.card(to.repo_id)

    def plan(self) -> PushResult:
        """What would be sent; opens no connection."""
        from huggingface_hub import ModelCard

        package = self.package
        card = PushedFile(CARD_FILE, len(self._card.encode()), "model card")
        files = [PushedFile(file.name, file.nbytes, file.note) for file in package.files]
        return PushResult(
            path=package.folder,
            repo_id=self.to.repo_id,
            kind=package.kind,
            base=package.base,
            base_revision=package.facts.base_revision,
            source=package.source,
            license=ModelCard(self._card).data.license,  # pyright: ignore[reportAttributeAccessIssue]: set from the YAML
            files=tuple(sorted([card, *files], key=lambda file: file.name)),
            left_behind=package.left_behind,
            dry_run=True,
        )

    def send(self, token: Secret, *, quiet: bool = True) -> PushResult:
        """Send it; see :func:`push`."""
        sent = send(self.package, self.to, token, bars=False if quiet else None)
        return replace(self.plan(), **vars(sent), dry_run=False)


@PUSH.checks
def push(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    license: str | None = None,
    base_id: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    quiet: bool = True,
) -> PushResult:
    """Publish a MAP adapter or a merged model as a model repository on the Hub.

    Only files that mapconv knows are sent, with a model card, in one commit; a repeated push of the same content makes
    none. A README.md on the Hub keeps the text that is not mapconv's.

    Args:
        path: the folder that ``upgrade`` or ``merge`` wrote; it is not changed.
        repo_id: ``owner/name``; created if it does not exist.
        private: create it private; refused where it exists and is public.
        revision: the branch to commit to, created from main if it does not exist; None is main.
        create_pr: open a pull request instead of committing to the branch.
        message: the commit's title.
        license: for the card; None copies the source's or the base's.
        base_id: the base model's Hub id; None takes what the result recorded.
        token: of an account that may write; None: the one that the Hub's client finds (``HF_TOKEN``, a login).
        dry_run: pack and check, open no connection.
        quiet: no progress bar.

    Raises:
        HubError: the Hub refuses or cannot be reached, or a local path would be sent. AdapterError, CheckpointError:
            the folder is broken. Nothing is visible on the Hub then, but for a repository that was just created.
    """
    secret = Secret(token)
    token = None  # a traceback that prints local variables must not find it here
    to = Destination(repo_id, private, revision, create_pr, message or MESSAGE.fallback)
    job = Push(path, to, license=license, base_id=base_id)
    return job.plan() if dry_run else job.send(secret, quiet=quiet)
