"""What was found in a finetune, described as an adapter of its base: the record that every writer here goes by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter, Module, TensorRef, WholeTensor
from mapconv.formats.config import parse_settings
from mapconv.formats.peft import CONFIG_FILE, KEY_PREFIX
from mapconv.placement.finetunes import Finetune, MatrixPair, WholePair
from mapconv.placement.model_class import TASKS
from mapconv.placement.selection import shortened

#: What the configuration says of a factor's rank until the ranks are known.
_NO_RANK = 1


def as_adapter(found: Finetune, matrices: Sequence[MatrixPair], wholes: Sequence[WholePair]) -> Adapter:
    """The adapter that takes the base to the finetune by these weights: modules without factors, and whole tensors.

    A whole tensor goes where PEFT keeps one: with its module in ``modules_to_save``, unless that is adapted itself, has
    parts of its own or other parameters that stay; then, and where names are tied, into the base's parameter.
    """
    modules, depths = _modules(matrices)
    adapted = {pair.path for pair in matrices if pair.stack is None}
    parents = {path.rpartition(".")[0] for path in found.paths}
    stacks = dict.fromkeys(pair.stack for pair in matrices if pair.stack is not None)
    # What PEFT saves is a whole module.
    changed = Counter(pair.path for pair in wholes)
    held = Counter(name.rpartition(".")[0] for name in found.parameters)
    saved: dict[str, None] = {}
    whole, others = [], dict[str, TensorRef]()
    for pair in wholes:
        depth = depths.get(pair.path, 0)
        in_place = pair.in_place or found.class_name is None or depth > 0 or pair.path in parents
        in_place = in_place or changed[pair.path] < held[pair.path]
        leaf = pair.parameter.rpartition(".")[2]
        name = f"{pair.path}{'.base_layer' * depth}.{leaf}"
        others[KEY_PREFIX + name] = pair.tuned
        whole.append(WholeTensor(pair.parameter, pair.tuned, in_place))
        if not in_place:
            saved[pair.path] = None
    config: dict[str, Any] = {
        "peft_type": "LORA",
        **_task(found.class_name),
        "r": _NO_RANK,
        "lora_alpha": _NO_RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": shortened(list(adapted), found.paths),
        "target_parameters": shortened(list(stacks), found.parameters) or None,
        "modules_to_save": shortened(list(saved), found.paths) or None,
    }
    folder = found.tuned.folder
    return Adapter(
        path=folder,
        method="full finetune",
        config=config,
        settings=parse_settings(config, Path(CONFIG_FILE)),
        modules=modules,
        whole=tuple(whole),
        others=others,
        base=None,
        revision=None,
    )


def _modules(matrices: Sequence[MatrixPair]) -> tuple[tuple[Module, ...], dict[str, int]]:
    """The modules as PEFT calls them, and how many wrappers it puts around each path.

    Of a module that holds several stacks PEFT wraps one after another, so that the first one ends up innermost.
    """
    depths = Counter({pair.path: pair.module.path for pair in matrices}.values())
    left, modules = dict(depths), dict[str, Module]()
    for pair in matrices:
        if pair.path not in modules:
            holder = pair.module.path
            left[holder] -= 1
            modules[pair.path] = replace(pair.module, path=f"{holder}{'.base_layer' * left[holder]}")
    return tuple(modules.values()), depths


def _task(class_name: str | None) -> dict[str, Any]:
    """How a configuration says which class the adapter is for: by a task where one stands for it."""
    if class_name is None:
        return {}
    endings = {task: name.removeprefix("AutoModel") for task, name in TASKS.items()}
    task = next((task for task, ending in endings.items() if ending and class_name.endswith(ending)), None)
    if task is not None or "LMHead" in class_name:
        return {"task_type": task or "CAUSAL_LM"}
    return {"auto_mapping": {"base_model_class": class_name, "parent_library": "transformers"}}
