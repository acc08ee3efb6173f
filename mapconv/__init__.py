"""mapconv: LoRA and DoRA adapters in MAP form (arXiv 2505.23094), checked, merged and published.

The functions of this module are what the commands run; each returns a typed result::

    import mapconv

    result = mapconv.upgrade("my-dora-adapter")
    print(result.out, result.worst_error)
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mapconv.version import __version__

if sys.platform == "win32":
    raise ImportError("mapconv runs on Linux and macOS, not on Windows itself: install and run it in WSL.")

if TYPE_CHECKING:
    from mapconv.commands.calibrate import calibrate
    from mapconv.commands.catalog import convert_catalog
    from mapconv.commands.combine import combine
    from mapconv.commands.export import export
    from mapconv.commands.extract import extract
    from mapconv.commands.inspect import inspect
    from mapconv.commands.merge import merge
    from mapconv.commands.push import push
    from mapconv.commands.rebase import rebase
    from mapconv.commands.report import report
    from mapconv.commands.statistics import statistics
    from mapconv.commands.upgrade import upgrade
    from mapconv.commands.verify import verify
    from mapconv.commands.verify_combination import verify_combination
    from mapconv.errors import MapconvError
    from mapconv.nn.attaching import detach, disabled, map_layers, set_adapter
    from mapconv.nn.config import MapConfig
    from mapconv.nn.loading import load_adapter
    from mapconv.nn.saving import save_adapter
    from mapconv.nn.training import get_map_model, print_trainable_parameters

__all__ = [
    "MapConfig", "MapconvError", "__version__", "calibrate", "combine", "convert_catalog", "detach", "disabled",
    "export", "extract", "get_map_model", "inspect", "load_adapter", "map_layers", "merge",
    "print_trainable_parameters", "push", "rebase", "report", "save_adapter", "set_adapter", "statistics", "upgrade",
    "verify",
    "verify_combination",
]  # fmt: skip

_HOMES = {
    "MapConfig": "mapconv.nn.config",
    "MapconvError": "mapconv.errors",
    "calibrate": "mapconv.commands.calibrate",
    "combine": "mapconv.commands.combine",
    "convert_catalog": "mapconv.commands.catalog",
    "detach": "mapconv.nn.attaching",
    "disabled": "mapconv.nn.attaching",
    "export": "mapconv.commands.export",
    "extract": "mapconv.commands.extract",
    "get_map_model": "mapconv.nn.training",
    "inspect": "mapconv.commands.inspect",
    "load_adapter": "mapconv.nn.loading",
    "map_layers": "mapconv.nn.attaching",
    "merge": "mapconv.commands.merge",
    "print_trainable_parameters": "mapconv.nn.training",
    "push": "mapconv.commands.push",
    "rebase": "mapconv.commands.rebase",
    "report": "mapconv.commands.report",
    "save_adapter": "mapconv.nn.saving",
    "set_adapter": "mapconv.nn.attaching",
    "statistics": "mapconv.commands.statistics",
    "upgrade": "mapconv.commands.upgrade",
    "verify": "mapconv.commands.verify",
    "verify_combination": "mapconv.commands.verify_combination",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used: ``import mapconv`` itself must not take torch's second."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mapconv' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
