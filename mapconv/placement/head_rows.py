"""Undo the order of q's and k's rows that other programs rotate positions by: only the base says how many heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mapconv.adapter import Adapter, Module
from mapconv.checkpoint.derived import PickedRows, derived
from mapconv.errors import PlacementError


def in_own_order(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """The adapter with the rows of q and k as transformers has them.

    Raises:
        PlacementError: the base's configuration does not say how many heads there are, or another number.
    """
    if not any(module.interleaved for module in adapter.modules):
        return adapter
    return replace(adapter, modules=tuple(_ordered(module, config) for module in adapter.modules))


def _ordered(module: Module, config: Mapping[str, Any]) -> Module:
    if module.interleaved is None:
        return module
    heads = config.get("num_attention_heads")
    if module.interleaved == "k":
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
    B = derived(module.lora_B.name, module.lora_B.shape, PickedRows((module.lora_B,), picked))
    return replace(module, lora_B=B, interleaved=None)
