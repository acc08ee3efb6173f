"""The errors that mapconv raises on purpose.

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

    ``transient``: the same call may succeed a moment later.
    """

    transient = False


class FidelityError(MapconvError):
    """A result is further from its source than the caller allows."""


class ResourceError(MapconvError):
    """The memory of this machine or its GPU does not suffice."""


class DependencyError(MapconvError):
    """An optional package or a device is absent."""
