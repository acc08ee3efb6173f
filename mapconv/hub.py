"""Find a base model: a local folder as it is, or a Hub id through the ordinary cache."""

from __future__ import annotations

from pathlib import Path

from mapconv.errors import CheckpointError

#: What a merge may need of a model: weights, configuration, tokenizer. Never optimizer states or pickles.
_MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")


def locate_base(base: str | Path | None, recorded: str | None, revision: str | None, adapter: Path) -> Path:
    """The folder of the base model: ``base`` if given, else what the adapter's configuration recorded.

    Raises:
        CheckpointError: neither names a model that can be had.
    """
    name = str(base) if base is not None else recorded
    if not name:
        raise CheckpointError(f"{adapter} does not say which model it adapts: give the base model with --base.")
    if is_folder(name):
        return Path(name)
    if base is None and not _is_repo_id(name):
        raise CheckpointError(
            f"{adapter} was trained on {name}, which is not on this machine: give the base model with --base."
        )
    if not _is_repo_id(name):
        raise CheckpointError(f"{name} is neither a folder nor a Hub id (owner/name): give the base model with --base.")
    return _from_hub(name, revision if base is None else None)


def is_folder(name: str) -> bool:
    """Whether ``name`` is a folder on this machine; a text that can be no path at all is none."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # too long for a path, or with a zero byte in it
        return False


def _is_repo_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "~"))


def _from_hub(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(_MODEL_FILES)))
    except Exception as error:  # the client's errors share no root: HTTP library, operating system, its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise CheckpointError(
            f"the base model {repo_id} cannot be had from the Hub ({reason}): give a folder with --base."
        ) from error
