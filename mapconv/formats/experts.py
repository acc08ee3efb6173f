"""Stacks of experts as some programs keep them: one three-dimensional tensor for all experts of a layer.

A is (E, r, in) and B (E, out, r); a stack of one stands for all experts (Tinker). Each expert's part of it is one LoRA
under the names of transformers 4 (``….experts.3.gate_proj``), which transformers 5 finds in its fused parameters.

======  =====================================================  =======================================================
Tinker  ``mlp.experts.w1``, ``w2``, ``w3``                     gate, down, up
SGLang  ``mlp.experts.gate_up_proj``, ``down_proj``            gate above up in B; in A too, where it has 2·r rows
MLX-LM  ``mlp.switch_mlp.gate_proj``, ``up_proj``, ``down_proj``
======  =====================================================  =======================================================

PEFT's own stacks (``target_parameters``) are matrices, of which only the base says how many experts are in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from mapconv.adapter import ITEM_SIZES, TensorRef
from mapconv.errors import AdapterError

_STACK = re.compile(r"(?P<parent>.+)\.(?:experts|switch_mlp)\.(?P<leaf>w[123]|(?:gate|up|down|gate_up)_proj)")
_ROLES = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
#: What transformers 4 called the parts of an expert: Mixtral's have numbers.
_NUMBERED = {"gate": "w1", "down": "w2", "up": "w3"}


def expert_name(parent: str, number: int, role: str) -> str:
    """transformers 4's name of one expert's gate, up or down projection in the layer ``parent``."""
    leaf = _NUMBERED[role] if parent.endswith("block_sparse_moe") else f"{role}_proj"
    return f"{parent}.experts.{number}.{leaf}"


Parts = Mapping[str, TensorRef]


def unstacked(modules: Mapping[str, Parts], A: str, B: str) -> dict[str, Parts]:
    """The tensors of each module, with every expert's in the place of a stack's.

    ``A`` and ``B`` are what the parts of a module call the two factors. A projection that the model has not got is a
    stack without elements, and gives nothing.

    Raises:
        AdapterError: stacks that make no weight together, or an expert that is there twice.
    """
    found: dict[str, Parts] = {}
    for path, parts in modules.items():
        for name, own in _of_experts(path, parts, A, B):
            if name in found:
                one, other = (next(iter(item.values())) for item in (found[name], own))
                raise AdapterError(f"{one.file}: {one.name} and {other.name} are both of module {name}.")
            found[name] = own
    return found


def _of_experts(path: str, parts: Parts, A: str, B: str) -> Iterator[tuple[str, Parts]]:
    match, down, up = _STACK.fullmatch(path), parts.get(A), parts.get(B)
    if match is None or down is None or up is None or not len(down.shape) == len(up.shape) == 3:
        yield path, parts
        return
    if not down.numel and not up.numel:
        return
    experts, (rank, height) = max(down.shape[0], up.shape[0]), (up.shape[2], up.shape[1])
    halves = 2 if match["leaf"] == "gate_up_proj" else 1
    fits = {down.shape[0], up.shape[0]} <= {1, experts} and down.shape[1] in (rank, halves * rank)
    if not fits or height % halves or not rank or len(parts) > 2:
        known = ", ".join(f"{ref.name} {list(ref.shape)}" for ref in parts.values())
        raise AdapterError(f"{down.file}: {known} make no stack of experts' factors (E, r, in) and (E, out, r).")
    roles = ("gate", "up") if halves == 2 else (_ROLES[match["leaf"]],)
    for number in range(experts):
        for half, role in enumerate(roles):
            first = half * rank if down.shape[1] > rank else 0
            rows = half * height // halves, (half + 1) * height // halves
            factors = {A: matrix_of(down, number, first, first + rank), B: matrix_of(up, number, *rows)}
            yield expert_name(match["parent"], number, role), factors


def matrix_of(stack: TensorRef, number: int, start: int, stop: int) -> TensorRef:
    """Some rows of one of a stack's matrices, which lie together in the file."""
    _, height, width = stack.shape
    first = (min(number, stack.shape[0] - 1) * height + start) * width
    return replace(stack, start=stack.start + first * ITEM_SIZES[stack.dtype], shape=(stop - start, width))
