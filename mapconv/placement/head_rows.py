"""Undo the order of q's and k's rows that other programs rotate positions by: only the base says how many heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mapconv.adapter import Adapter, Module
from mapconv.checkpoint.derived import picked_rows
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.untrusted.schema import shown


def in_own_order(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """The adapter with the rows of q and k as transformers has them.

    Raises:
        PlacementError: the base's configuration does not say how many heads there are, or another number.
        UnsupportedError: the adapter's program orders rows by the model's type, and this one's is not known.
    """
    if not any(module.interleaved for module in adapter.modules):
        return adapter
    return replace(adapter, modules=tuple(_ordered(module, adapter, config) for module in adapter.modules))


def _ordered(module: Module, adapter: Adapter, config: Mapping[str, Any]) -> Module:
    order = module.interleaved
    if order is None:
        return module
    if order.types:
        kind = config.get("model_type")
        if kind in order.plain_types:
            return replace(module, interleaved=None)
        if kind not in order.types:
            known = ", ".join(sorted(order.types | order.plain_types))
            raise UnsupportedError(
                f"{adapter.path} is of {adapter.dialect}, whose order of q's and k's rows is known to mapconv for "
                f"{known}, and the base's config.json says {shown(kind)}."
            )
    heads = config.get("num_attention_heads")
    if order.heads == "k":
        heads = config.get("num_key_value_heads") or heads
    rows = module.lora_B.shape[0]
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        raise PlacementError(
            f"{module.path} has {rows:,} rows in the order of their heads, and the base's config.json says that there "
            f"are {heads}: is it the model that the adapter was trained on (--base)?"
        )
    size = rows // heads
    # Row (head, half, place) is stored at (head, place, half).
    picked = tuple(
        head * size + place * 2 + half for head in range(heads) for half in (0, 1) for place in range(size // 2)
    )
    magnitude = None if module.magnitude is None else picked_rows(module.magnitude, picked)
    return replace(module, lora_B=picked_rows(module.lora_B, picked), magnitude=magnitude, interleaved=None)
