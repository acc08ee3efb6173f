"""Which base tensor each adapted module lands on: from names and shapes alone, or an error that lists the misfits.

A checkpoint and an adapter may name the same weight with or without the model's prefix: `gpt2` stores
``h.0.attn.c_attn.weight`` for what an adapter calls ``transformer.h.0.attn.c_attn`` (transformers'
``base_model_prefix``). One such renaming is chosen for the whole adapter, never one for each module.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mapconv.errors import PlacementError
from mapconv.wording import counted

#: At most this many misfits are listed in full.
_LISTED = 5


@dataclass(frozen=True)
class Renaming:
    """How module paths of the adapter are spelled in the checkpoint: a leading part dropped, added, or neither."""

    drop: str = ""
    add: str = ""

    def to_checkpoint(self, path: str) -> str:
        return self.add + path.removeprefix(self.drop)

    def to_adapter(self, path: str) -> str:
        return self.drop + path.removeprefix(self.add)


def place(
    modules: Mapping[str, tuple[int, ...]], tensors: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], Renaming]:
    """Map each module path to the name of the base tensor that it adapts.

    Args:
        modules: weight shape (out, in) of each module path of the adapter.
        tensors: shape of each tensor of the base checkpoint, by name.

    Raises:
        PlacementError: a module without a tensor, of another shape, or two modules on one tensor.
    """
    renaming = best_renaming(modules, tensors)
    placed: dict[str, str] = {}
    owners: dict[str, str] = {}
    misfits: list[str] = []
    for path, shape in modules.items():
        name = tensor_name(path, renaming, tensors)
        if name not in tensors:
            misfits.append(f"{path}: no tensor {name}{nearest(name, tensors) if len(misfits) < _LISTED else ''}")
        elif tensors[name] != shape:
            misfits.append(f"{path}: {name} is {list(tensors[name])}, the adapter expects {list(shape)}")
        elif name in owners:
            misfits.append(f"{path}: {name} is adapted by {owners[name]} already")
        else:
            placed[path] = name
            owners[name] = path
    if misfits:
        raise PlacementError(misfit_report(misfits, len(modules)))
    return placed, renaming


def require_all_targets(config: Mapping[str, Any], placed: Container[str], paths: Iterable[str]) -> None:
    """Refuse an adapter that says it adapts a module, but has no tensors for it.

    PEFT would load such a file and leave the module unadapted, with a warning that scrolls by.

    Args:
        config: the adapter's configuration.
        placed: module paths that have factors.
        paths: the module paths that could be adapted.

    Raises:
        PlacementError: the modules that the configuration targets and the file lacks.
    """
    is_target = _target_rule(config)
    if is_target is None:
        return
    missing = [f"{path}: no tensors in the file" for path in paths if is_target(path) and path not in placed]
    if missing:
        raise PlacementError(
            f"the configuration's target_modules name {counted(len(missing), 'module')} that the adapter file "
            f"lacks, so it is incomplete:\n{_listing(missing)}"
        )


def linear_paths(tensors: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The module paths, as the checkpoint spells them, of all that may be linear layers."""
    return [
        name.removesuffix(".weight") for name, shape in tensors.items() if len(shape) == 2 and name.endswith(".weight")
    ]


def best_renaming(modules: Collection[str], tensors: Mapping[str, Any]) -> Renaming:
    """The renaming under which most modules have a tensor; the plainest one where several do equally well."""
    heads = {path.partition(".")[0] + "." for path in modules if "." in path}
    tensor_heads = {name.partition(".")[0] + "." for name in tensors if name.count(".") > 1}
    candidates = [Renaming(), *(Renaming(drop=head) for head in sorted(heads))]
    candidates += [Renaming(add=head) for head in sorted(tensor_heads)]
    return max(
        candidates, key=lambda renaming: sum(tensor_name(path, renaming, tensors) in tensors for path in modules)
    )


def tensor_name(path: str, renaming: Renaming, tensors: Mapping[str, Any], leaf: str = "weight") -> str:
    """What the checkpoint calls a parameter of the module that the adapter calls ``path``, if it has it."""
    name, plain = f"{renaming.to_checkpoint(path)}.{leaf}", f"{path}.{leaf}"
    # A head such as lm_head lies outside the prefix that the rest of the checkpoint has.
    return plain if renaming.add and name not in tensors and plain in tensors else name


def _target_rule(config: Mapping[str, Any]) -> Callable[[str], bool] | None:
    """PEFT's ``check_target_module_exists`` for the forms of target_modules that name modules one by one."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        return None  # a regex or "all-linear" needs the model's classes to tell a Linear from an Embedding
    if any(config.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")):
        return None
    exact = set(targets)
    endings = tuple(f".{target}" for target in targets)
    return lambda path: path in exact or path.endswith(endings)


def nearest(name: str, tensors: Mapping[str, Any]) -> str:
    """`` (nearest: …)`` with the names most like ``name``, or nothing."""
    # Numbers differ a thousand times over in a large model: compare the names of this layer first.
    numbers = re.findall(r"\d+", name)
    pool = [other for other in tensors if re.findall(r"\d+", other) == numbers] or list(tensors)[:2000]
    close = difflib.get_close_matches(name, pool, n=2, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""


def misfit_report(misfits: list[str], total: int) -> str:
    """One sentence and the first few misfits."""
    return (
        f"{len(misfits)} of the adapter's {counted(total, 'module')} {'does' if len(misfits) == 1 else 'do'} not fit "
        f"this base: is it the model that the adapter was trained on (--base)?\n{_listing(misfits)}"
    )


def _listing(lines: list[str]) -> str:
    more = [f"  … and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "\n".join([f"  {line}" for line in lines[:_LISTED]] + more)
