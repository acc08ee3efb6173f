"""Experts that a file has apart, on gpt-oss, whose one parameter for all of them has the rows of gate and up in turn.

Tinker trains the three projections of each expert there, and calls attention ``attn`` (tinker-cookbook,
``weights/_merge_gpt_oss.py``). transformers never stored these experts apart, so a part of one has no name to be placed
by; PEFT's stacks have.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mapconv.adapter import Adapter, Module
from mapconv.checkpoint.stacks import Block, stacked
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.untrusted.patterns import PatternTable
from mapconv.untrusted.schema import shown

_EXPERT = re.compile(r"(?P<parent>.+\.mlp\.experts)\.(?P<number>[0-9]{1,6})\.(?P<role>gate|up|down)_proj")
_ATTENTION = re.compile(r"(?P<layer>.+\.layers\.[0-9]+)\.attn\.(?P<leaf>[qkvo]_proj)")
#: The parameters of a layer's experts, innermost first as PEFT wraps them, and the row that each part begins at.
_PARAMETERS = {"gate_up_proj": {"gate": 0, "up": 1}, "down_proj": {"down": 0}}


def in_own_stacks(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """The adapter with its experts as PEFT's stacks, where the base is gpt-oss.

    Raises:
        PlacementError: an expert that the base has not got. UnsupportedError: one that is no plain LoRA.
    """
    if config.get("model_type") != "gpt_oss":
        return adapter
    modules: list[Module] = []
    experts: dict[str, list[tuple[int, str, Module]]] = defaultdict(list)
    for module in adapter.modules:
        match = _EXPERT.fullmatch(module.path)
        if match is not None:
            experts[match["parent"]].append((int(match["number"]), match["role"], module))
            continue
        attention = _ATTENTION.fullmatch(module.path)
        path = module.path if attention is None else f"{attention['layer']}.self_attn.{attention['leaf']}"
        modules.append(replace(module, path=path))
    if not experts:
        return replace(adapter, modules=tuple(modules))
    count = config.get("num_local_experts")
    if type(count) is not int or not 0 < count < 1_000_000:
        raise PlacementError(f"the base's config.json says {shown(count)} experts (num_local_experts): correct it.")
    ranks: dict[str, int] = {}
    for parent, members in experts.items():
        _check(adapter, members, count)
        stacks = [_stack(adapter, parent, name, members, count) for name in _PARAMETERS]
        found = [(name, stack) for name, stack in zip(_PARAMETERS, stacks, strict=True) if stack is not None]
        for depth, (name, stack) in enumerate(found):
            modules.append(replace(stack, path=parent + ".base_layer" * (len(found) - 1 - depth)))
            ranks[f"{parent}.{name}"] = stack.rank // count
    return replace(_with_ranks(adapter, ranks), modules=tuple(modules))


def _check(adapter: Adapter, members: Sequence[tuple[int, str, Module]], count: int) -> None:
    settings = adapter.settings
    for number, _, module in members:
        if number >= count:
            raise PlacementError(f"{module.path}: the base has {count} experts (num_local_experts).")
        if module.magnitude is not None or module.bias is not None or module.method is not None:
            raise UnsupportedError(
                f"{module.path} is no plain LoRA, and PEFT has no other form for a stack of experts."
            )
        if not settings.by_module and settings.rank_of(module.path) != module.rank:
            raise PlacementError(
                f"{module.path}: the factors have rank {module.rank}, the configuration says "
                f"{settings.rank_of(module.path)}"
            )


def _stack(
    adapter: Adapter, parent: str, name: str, members: Sequence[tuple[int, str, Module]], count: int
) -> Module | None:
    """One parameter's factors: every part of an expert has a rank of its own, and its rows in turn with the others'."""
    rows = _PARAMETERS[name]
    parts = sorted(((number, rows[role], module) for number, role, module in members if role in rows), key=_order)
    if not parts:
        return None
    settings, used, blocks = adapter.settings, dict.fromkeys(range(count), 0), []
    for number, row, module in parts:
        scale = module.scaling if settings.by_module else settings.scaling_of(module.path)
        blocks.append(Block(module.lora_A, module.lora_B, number, used[number], row, step=len(rows), scale=scale))
        used[number] += module.rank
    shapes = {module.weight_shape for _, _, module in parts}
    if len(shapes) != 1:
        known = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise PlacementError(f"{parent}: parts of {name} are {known} (out, in), which are not of one size")
    rank, ((height, _),) = max(used.values()), shapes
    A, B = stacked(parent, blocks, experts=count, rank=rank, height=len(rows) * height)
    return Module(parent, count * rank, 1.0, A, B)


def _order(part: tuple[int, int, Module]) -> tuple[int, int]:
    return part[0], part[1]


def _with_ranks(adapter: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """The adapter whose configuration names the stacks, each with its rank and a scaling of 1."""
    settings = adapter.settings
    alphas = {name: math.sqrt(rank) if settings.use_rslora else float(rank) for name, rank in ranks.items()}
    more = {
        "target_parameters": (*settings.target_parameters, *ranks),
        "rank_pattern": PatternTable({**ranks, **dict(settings.rank_pattern.items())}, "rank_pattern"),
        "alpha_pattern": PatternTable({**alphas, **dict(settings.alpha_pattern.items())}, "alpha_pattern"),
    }
    config = {**adapter.config, "target_parameters": list(more["target_parameters"])}
    return replace(adapter, settings=replace(settings, **more), config=config)
