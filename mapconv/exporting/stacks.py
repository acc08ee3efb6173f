"""Experts' factors as three-dimensional tensors of all experts of a layer, out of one module for each projection."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from mapconv.exporting.plain import Export, PlainModule

_EXPERT = re.compile(r"(?P<parent>.+)\.experts\.(?P<number>[0-9]+)\.(?P<leaf>[^.]+)")
#: The projections in their order in a fused stack, by the names of transformers 4.
_ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
#: A layout's stacks: the name of each, and the projections that are in it.
_STACKS = {
    "tinker": {"experts.w1": ("gate",), "experts.w3": ("up",), "experts.w2": ("down",)},
    "sglang": {"experts.gate_up_proj": ("gate", "up"), "experts.down_proj": ("down",)},
    "gguf": {"ffn_gate_exps": ("gate",), "ffn_up_exps": ("up",), "ffn_down_exps": ("down",)},
    "switch": {
        "switch_mlp.gate_proj": ("gate",),
        "switch_mlp.up_proj": ("up",),
        "switch_mlp.down_proj": ("down",),
    },
}
_Experts = dict[str, dict[int, PlainModule]]


def apart(export: Export) -> tuple[list[PlainModule], list[tuple[str, torch.Tensor, torch.Tensor]]]:
    """(the modules that are no experts, the stacks of the others: name, A (E, r, in), B (E, out, r)).

    In a layout without stacks all modules are of the first kind. Of a fused stack A has the parts' rows one under the
    other, and B as many columns as one of them.
    """
    stacks = _STACKS.get(export.experts or "")
    if stacks is None:
        return list(export.modules), []
    others: list[PlainModule] = []
    layers: dict[str, _Experts] = defaultdict(lambda: defaultdict(dict))
    for module in export.modules:
        match = _EXPERT.fullmatch(module.path)
        role = None if match is None else _ROLES.get(match["leaf"])
        if match is None or role is None:
            others.append(module)
        else:
            layers[match["parent"]][role][int(match["number"])] = module
    found = []
    for parent, experts in layers.items():
        for name, roles in stacks.items():
            if any(role in experts for role in roles):
                found.append((f"{parent}.{name}", *_stack(export, experts, roles)))
    return others, found


def _stack(export: Export, experts: _Experts, roles: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """One stack's factors; a projection that is not adapted has zeros in the shape of the other."""
    parts = [_role(export, experts[role]) if role in experts else None for role in roles]
    known = next(part for part in parts if part is not None)
    pairs = [tuple(map(torch.zeros_like, known)) if part is None else part for part in parts]
    return torch.cat([A for A, _ in pairs], dim=1), torch.cat([B for _, B in pairs], dim=1)


def _role(export: Export, experts: dict[int, PlainModule]) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [export.factors(experts[number]) for number in sorted(experts)]
    return torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])


def stack_names(export: Export) -> Iterator[str]:
    """The last parts of the stacks' names."""
    leaves = {name.rpartition(".")[2] for name in _STACKS.get(export.experts or "", {})}
    yield from sorted(leaves)
