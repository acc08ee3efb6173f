"""One sentence for each way in which the Hub or its client fails: what is wrong, and what to do next.

A sentence holds the Hub's own short message where there is one, and never a header, a page of HTML, or a token.
"""

from __future__ import annotations

from typing import Literal

from mapconv.hub.client_errors import is_garbled, is_offline, is_transport, retry_after, status_of

Doing = Literal["read", "write"]


def explain(error: BaseException, name: str, doing: Doing) -> str:
    """The sentence for ``error``, which happened while ``name`` (a repository) was read or written."""
    from huggingface_hub import constants, errors

    hub, repo, kind = constants.ENDPOINT, name.partition("@")[0], type(error).__name__
    if is_offline(error):
        if doing == "write":
            return f"{name} cannot be pushed to while HF_HUB_OFFLINE is set: unset it and run the command again."
        return f"{name} is not in the local cache, and the Hub is not asked while HF_HUB_OFFLINE is set: unset it."
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: request access at {hub}/{repo}, then set HF_TOKEN to a token of that account."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no such branch, tag or commit: see {hub}/{repo}/branches."
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"no token was found for {name}: log in with `hf auth login`, or set HF_TOKEN."
    if isinstance(error, errors.IncompleteSnapshotError):
        return f"{name} is only partly in the local cache, and the Hub cannot be reached: connect and run again."
    status = status_of(error)
    if status is not None:
        return _of_status(status, error, name, doing, hub)
    if _is_xet(error):
        return (
            f"the Hub's Xet storage failed for {name} ({_line(error)}): run the same command again, or set "
            "HF_HUB_DISABLE_XET=1 to avoid it."
        )
    if is_transport(error):
        return (
            f"the Hub at {hub} cannot be reached ({kind}) for {name}: check the network and HF_ENDPOINT, then run the "
            "same command again."
        )
    if is_garbled(error) or isinstance(error, errors.FileMetadataError):
        return (
            f"{hub} does not answer as the Hub does ({kind}) for {name}: check HF_ENDPOINT, and whether a proxy stands "
            "in between."
        )
    if "Invalid metadata in README.md" in str(error):
        reason = str(error).strip().splitlines()[-1].removeprefix("- ")[:160].rstrip(".")
        return f"the Hub does not accept the model card of {name} ({reason}): correct README.md and push again."
    return f"the Hub's client failed for {name} ({kind}: {_line(error)}): run the same command again."


def _of_status(status: int, error: BaseException, name: str, doing: Doing, hub: str) -> str:
    said = _server_message(error)
    reading = doing == "read"
    if status == 401 and _sent_token(error):
        return f"the Hub does not accept the token for {name} (401): make a new one at {hub}/settings/tokens."
    if status == 401 and reading:
        return (
            f"{name} is not a folder here and not on the Hub, or it is private and no token was sent (401): check the "
            "name, or log in with `hf auth login` or HF_TOKEN."
        )
    if status == 401:
        return f"pushing to {name} needs a token (401): log in with `hf auth login`, set HF_TOKEN or pass --token."
    if status == 403 and reading:
        return f"the Hub forbids reading {name} with this token (403{said}): use a token of an account with access."
    if status == 403:
        return (
            f"this token may not write to {name} (403{said}): make one with write permission at {hub}/settings/tokens, "
            "or push to a name of your own."
        )
    if status == 404 and reading:
        return f"{name} is neither a folder here nor a repository that the Hub shows you (404): check the name."
    if status == 404:
        return f"the Hub shows no repository {name} (404): check the name, and that the token gives access to it."
    if status == 409:
        return f"another operation on {name} is in progress (409{said}): wait a moment and run the same command again."
    if status == 412:
        return f"somebody else keeps committing to {name} (412): run the same command again when they are done."
    if status == 413:
        return f"the Hub finds a file or the commit for {name} too large (413): see its limits for repositories."
    if status == 429:
        seconds = retry_after(error)
        later = f"in {seconds:.0f} seconds" if seconds else "in a few minutes"
        return f"the Hub limits the rate of requests (429) for {name}: run the same command again {later}."
    if status >= 500:
        return f"the Hub has trouble ({status}) with {name}: run the same command again later to continue."
    return f"the Hub refuses the request for {name} ({status}{said}): correct what it names and run again."


def _sent_token(error: BaseException) -> bool:
    request = getattr(getattr(error, "response", None), "request", None)
    return "authorization" in {key.lower() for key in getattr(request, "headers", None) or {}}


def _server_message(error: BaseException) -> str:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    message = " ".join(headers.get("X-Error-Message", "").split())
    return f": {message[:120].rstrip('.')}" if message else ""


def _is_xet(error: BaseException) -> bool:
    return "xet" in f"{type(error).__module__} {type(error).__name__} {error}".lower()


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160].rstrip(".")
