"""The errors that mapconv raises on purpose, and the sentence that any error becomes.

    MapconvError                     the root: catch this one
    ├── AdapterError                 the adapter's files or its configuration are broken
    │   └── UnsupportedError         they are sound, but mapconv refuses this feature, by name
    ├── CheckpointError              the base model's files are broken or missing
    ├── PlacementError               adapter tensors that fit no base tensor
    ├── BaseMismatchError            a MAP adapter meets another base than the one it was made for
    ├── OutputError                  the place to write to is taken, full or forbidden
    │   └── DiskFullError            there is no room for what would be written
    ├── CatalogError                 a catalog or its ledger cannot be used
    ├── WorkerDiedError              a worker process ended in the midst of an entry
    ├── DataError                    a data file, a tokenizer or a checkpoint that cannot be used
    ├── HubError                     the Hub cannot be reached or refuses, or would be told what must stay here
    ├── FidelityError                a result is further from its source than the caller allows
    ├── ResourceError                the memory does not suffice
    └── DependencyError              an optional package or a device is absent

Each message is one sentence that a user can act on: what is wrong, in which file or tensor, what was
expected, and what to do next.
"""

from __future__ import annotations

import errno

#: What to say of an operating system's refusal, by its number.
_SYSTEM_ERRORS = {
    errno.ENOSPC: "no space left on the disk: free some space and run the command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the command again",
    errno.EACCES: "permission denied: change its permissions, or give another folder",
    errno.EPERM: "not permitted: change its permissions, or give another folder",
    errno.EROFS: "the file system is read-only: choose another output folder",
    errno.EFBIG: "the file is larger than this file system or a limit of this shell allows",
}


class MapconvError(Exception):
    """Root of every error that mapconv raises on purpose."""


class AdapterError(MapconvError):
    """The adapter's files or its configuration are broken."""


class UnsupportedError(AdapterError):
    """The adapter is sound, but uses a feature that mapconv refuses by name."""


class CheckpointError(MapconvError):
    """The base model's files are broken or missing."""


class PlacementError(MapconvError):
    """Adapter tensors that land on no base tensor of the right shape."""


class BaseMismatchError(MapconvError):
    """A MAP adapter meets another base than the one it was made for."""


class OutputError(MapconvError):
    """The output cannot be written where it was asked for."""


class DiskFullError(OutputError):
    """There is no room for what would be written."""


class CatalogError(MapconvError):
    """A catalog or its ledger cannot be used."""


class WorkerDiedError(MapconvError):
    """A worker process ended in the midst of an entry."""


class DataError(MapconvError):
    """A data file, a tokenizer or a training checkpoint cannot be used."""


class HubError(MapconvError):
    """The Hub cannot be reached or refuses, or a push would send what must stay here.

    ``transient``: the same call may succeed a moment later. ``status``: of the Hub's answer, where there was one.
    """

    transient = False
    status: int | None = None


class FidelityError(MapconvError):
    """A result is further from its source than the caller allows."""


class ResourceError(MapconvError):
    """The memory of this machine or its GPU does not suffice."""


class DependencyError(MapconvError):
    """An optional package or a device is absent."""


#: How libraries spell it that an allocation failed, whatever the type of their error.
_OUT_OF_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "std::bad_alloc",
    "failed to map segment", "unable to allocate", "can't start new thread",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine, of its GPU or of this process's limit does not suffice."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError | OSError | ImportError) and any(words in text for words in _OUT_OF_MEMORY))
    )


def sentence(error: Exception) -> str:
    """What to tell a user of any error."""
    if isinstance(error, MapconvError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory: close other programs, use --device cpu, or convert on a larger machine."
    if isinstance(error, OSError):
        reason = _SYSTEM_ERRORS.get(error.errno or 0) or error.strerror or str(error)
        return f"{error.filename}: {reason}." if error.filename else f"{reason}."
    if isinstance(error, ValueError):
        return f"{error}."
    lines = str(error).strip().splitlines() or [""]
    return (
        f"unexpected {type(error).__name__} ({lines[0][:200]}): this is a bug in mapconv; run again with "
        "MAPCONV_DEBUG=1 and report the traceback."
    )
