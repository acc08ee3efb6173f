"""A finetune beside its base where no class of transformers tells more than their tensors' names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mapconv.adapter import Module, TensorRef
from mapconv.checkpoint.index import Checkpoint
from mapconv.placement.finetunes import Finetune, MatrixPair, WholePair, require_alike
from mapconv.placement.weights import Piece, WeightView


def by_name(
    base: Checkpoint, config: Mapping[str, Any], tuned: Checkpoint, is_target: Callable[[str], bool] | None
) -> Finetune:
    """Pairs of equal names, where no class tells more: a matrix is taken for a linear layer, unless it looks up rows.

    Raises:
        PlacementError: names or shapes that differ.
    """
    faults = [f"{name}: {tuned.folder} has no such tensor" for name in base.tensors.keys() - tuned.tensors.keys()]
    faults += [f"{name}: {base.folder} has no such tensor" for name in tuned.tensors.keys() - base.tensors.keys()]
    faults += [
        f"{name}: {list(ref.shape)} in the base, {list(tuned.tensors[name].shape)} in the finetune"
        for name, ref in base.tensors.items()
        if name in tuned.tensors and tuned.tensors[name].shape != ref.shape
    ]
    require_alike(faults, base, tuned)
    matrices, wholes = [], []
    for name, ref in base.tensors.items():
        path, other = name.removesuffix(".weight"), tuned.tensors[name]
        dense = len(ref.shape) == 2 or (len(ref.shape) > 2 and ref.shape[1] > 1)
        looked_up = "embed" in path.rpartition(".")[2].lower() and len(ref.shape) == 2
        if path != name and dense and not looked_up and (is_target is None or is_target(path)):
            kind = "linear" if len(ref.shape) == 2 else "conv"
            module = module_of(path, kind, ref.shape, other)
            matrices.append(MatrixPair(module, _view(ref, module), _view(other, module)))
        else:
            wholes.append(WholePair(name, ref, other, in_place=True))
    paths = tuple(dict.fromkeys(name.rpartition(".")[0] for name in base.tensors))
    return Finetune(base, tuned, None, config, paths, tuple(base.tensors), tuple(matrices), tuple(wholes))


def module_of(path: str, kind: str, shape: tuple[int, ...], like: TensorRef) -> Module:
    """A module of rank 0 whose factors have the shapes that PEFT gives them for a layer of this kind."""
    if kind == "conv":
        plain = Module.without_factors(path, (shape[0], 1), like)
        A = replace(plain.lora_A, shape=(0, *shape[1:]))
        return replace(plain, lora_A=A, lora_B=replace(plain.lora_B, shape=(shape[0], 0, *(1 for _ in shape[2:]))))
    height, width = (shape[0], shape[1]) if kind == "linear" else (shape[1], shape[0])
    return replace(Module.without_factors(path, (height, width), like), embedding=kind == "embedding")


def _view(ref: TensorRef, module: Module) -> WeightView:
    return WeightView(module.weight_shape, (Piece(ref, 0, ref.shape[0]),))
