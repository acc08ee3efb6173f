"""mapconv: LoRA and DoRA adapters in MAP form (arXiv 2505.23094), checked, merged and published.

The functions of this module are what the commands run; each returns a typed result::

    import mapconv

    result = mapconv.upgrade("my-dora-adapter")
    print(result.out, result.worst_error)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mapconv.commands.calibrate import calibrate
    from mapconv.commands.inspect import inspect
    from mapconv.commands.merge import merge
    from mapconv.commands.push import push
    from mapconv.commands.upgrade import upgrade
    from mapconv.commands.verify import verify
    from mapconv.errors import MapconvError

__version__ = "0.1.0"
__all__ = ["MapconvError", "calibrate", "inspect", "merge", "push", "upgrade", "verify"]

_HOMES = {
    "MapconvError": "mapconv.errors",
    "calibrate": "mapconv.commands.calibrate",
    "inspect": "mapconv.commands.inspect",
    "merge": "mapconv.commands.merge",
    "push": "mapconv.commands.push",
    "upgrade": "mapconv.commands.upgrade",
    "verify": "mapconv.commands.verify",
}


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used: ``import mapconv`` itself must not take torch's second."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mapconv' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
