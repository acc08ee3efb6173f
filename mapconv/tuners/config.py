"""An adapter's configuration as PEFT's own object, for the layers that its file has and for those alone.

What selects layers is replaced by their names: the file says which they are. Every field must be one that the installed
PEFT knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from mapconv.adapter import Module
from mapconv.errors import UnsupportedError
from mapconv.spelling import TunerMethod
from mapconv.untrusted.patterns import PatternTable, require_bounded
from mapconv.untrusted.schema import shown

#: What selects layers, and where they come from; none of it changes what a layer computes.
_SELECTING = frozenset(
    {
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode", "peft_type"),
        *("trainable_token_indices", "peft_version"),
    }
)
#: Fields that say something of layers by their names.
_PATTERNS = ("rank_pattern", "alpha_pattern")
_SEED = re.compile("seed|prng_key")
#: A size may be as large as this, whatever the file holds.
_ANY_SIZE = 1 << 14


def tuner_config(method: TunerMethod, modules: Sequence[Module]) -> Any:
    """PEFT's configuration for these layers.

    Raises:
        UnsupportedError: a field that the installed PEFT does not know, or a size that no tensor of the file has.
    """
    from peft import PeftConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = str(method.config["peft_type"]).upper()
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])}
    largest = max(_ANY_SIZE, *(ref.numel for module in modules for _, ref in module.own))
    values: dict[str, Any] = {}
    for name, value in method.config.items():
        if name in _SELECTING or value is None:
            continue
        if name not in known and value not in (False, [], {}):
            raise UnsupportedError(
                f"{method.file}: {name}={shown(value)} is a field of {method.name} that the installed PEFT does not "
                "know: update PEFT, or remove it if it does not change the weights."
            )
        if type(value) is int and value > largest and not _SEED.search(name):
            raise UnsupportedError(f"{method.file}: {name}={value:,} is larger than any tensor of the file.")
        if name in known:
            values[name] = value
    paths = [module.path for module in modules]
    for name in _PATTERNS:
        if (table := _pattern(method, name)) is not None:
            found = {path: table.get(path, None) for path in paths}
            values[name] = {re.escape(path): value for path, value in found.items() if value is not None}
    if kind == "ADALORA":
        values |= _allocated(modules)
    if isinstance(values.get("feedforward_modules"), str):
        for path in paths:
            require_bounded(values["feedforward_modules"], path, f"{method.file}: feedforward_modules")
    if "progressbar" in known:
        values["progressbar"] = False
    feedforward = values.pop("feedforward_modules", None)
    # The class of one method, whose fields PEFT does not tell from its name.
    config: Any = PeftConfig.from_peft_type(peft_type=kind, **values, inference_mode=True)
    config.target_modules = set(paths)
    if feedforward is not None:
        config.feedforward_modules = feedforward
    return config


def by_name(method: TunerMethod, paths: Sequence[str]) -> list[tuple[object, ...]]:
    """What a configuration says of each layer because of its name."""
    tables = [table for name in _PATTERNS if (table := _pattern(method, name)) is not None]
    feedforward, place = method.config.get("feedforward_modules"), f"{method.file}: feedforward_modules"

    def is_feedforward(path: str) -> bool:
        if isinstance(feedforward, str):
            require_bounded(feedforward, path, place)
            return re.fullmatch(feedforward, path) is not None
        return isinstance(feedforward, list) and path.endswith(tuple(map(str, feedforward)))

    return [(*(table.get(path, None) for table in tables), is_feedforward(path)) for path in paths]


def _pattern(method: TunerMethod, name: str) -> PatternTable | None:
    """A table of the configuration, if PEFT reads it: AdaLoRA's is what its allocator did."""
    table = method.config.get(name)
    if not isinstance(table, dict) or str(method.config["peft_type"]).upper() == "ADALORA":
        return None
    return PatternTable(table, f"{method.file}: {name}")


def _allocated(modules: Sequence[Module]) -> Mapping[str, Any]:
    """AdaLoRA's final rank of a layer, as the rank that it starts with: what its allocator took away is not saved."""
    ranks = {ref.shape[0] for module in modules for name, ref in module.own if name == "lora_E"}
    return {"rank_pattern": None, "init_r": max(ranks, default=1)}
