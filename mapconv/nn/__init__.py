"""MAP inside a live model: attach adapters, run and switch them, train them, save them.

from mapconv.nn import load_adapter, save_adapter

load_adapter(model, "my-adapter-map", trainable="scalars")
...
save_adapter(model, "trained-map")
"""

from mapconv.nn.attaching import (
    active_adapter,
    detach,
    disabled,
    factor_parameters,
    map_layers,
    scalar_parameters,
    set_adapter,
    update_sizes,
)
from mapconv.nn.config import MapConfig
from mapconv.nn.layers import MapLayer
from mapconv.nn.loading import load_adapter
from mapconv.nn.merging import merge_adapter, unmerge_adapter
from mapconv.nn.saving import save_adapter
from mapconv.nn.training import get_map_model

__all__ = [
    "MapConfig",
    "MapLayer",
    "active_adapter",
    "detach",
    "disabled",
    "factor_parameters",
    "get_map_model",
    "load_adapter",
    "map_layers",
    "merge_adapter",
    "save_adapter",
    "scalar_parameters",
    "set_adapter",
    "unmerge_adapter",
    "update_sizes",
]
