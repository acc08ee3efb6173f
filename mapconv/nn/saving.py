"""Write an attached adapter as a MAP directory, which stock PEFT loads with the same outputs.

What is as it was loaded is written as it was loaded, to the byte. All else is computed in float64 from the values that
are written: factors of D = (b/a)·BA, scalars, and the magnitude with which PEFT makes a·(W0 + D) of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mapconv.adapter import MapModule, Module, TensorRef
from mapconv.algebra.norms import product_norm
from mapconv.checkpoint.sidecars import copy_tokenizer
from mapconv.checkpoint.staging import check_output, staged_folder, write_file
from mapconv.checkpoint.writer import SpooledFile
from mapconv.errors import OutputError, UnsupportedError
from mapconv.formats.mapdir import needs_magnitude, peft_config, peft_factors, peft_magnitude, write_configs
from mapconv.formats.peft import WEIGHTS_FILE
from mapconv.metadata.card import CARD_FILE, local_card
from mapconv.nn.attaching import Attached, layers_of, named, updates_of
from mapconv.nn.bases import kind_of, merged_row_norms, values_of
from mapconv.nn.dora import DoraUpdate, direction_norm
from mapconv.nn.layers import MapLayer
from mapconv.nn.method_files import write_method
from mapconv.nn.methods import MethodUpdate
from mapconv.nn.origin import base_facts, is_respelled, live_base, live_record, pattern_name, source_config
from mapconv.nn.stacks import MapParameterLayer, StackUpdate
from mapconv.nn.updates import Update
from mapconv.refit.solving import SMALLEST_GAIN


@dataclass(frozen=True)
class Saved:
    """One weight as it is written, or a stack of them; ``magnitude`` is None where only a LoRA would do without."""

    module: Module
    scalars: tuple[MapModule, ...]
    A: torch.Tensor
    B: torch.Tensor
    magnitude: torch.Tensor | None


def save_adapter(model: nn.Module, path: str | Path, *, name: str = "default", force: bool = False) -> Path:
    """Write the adapter ``name`` as a MAP directory: whole or not at all, ``map_config.json`` last.

    An adapter on another method's layers is written as that method's own file (``mapconv.nn.method_files``).

    Args:
        model: the model that the adapter is attached to.
        path: the folder to write.
        name: which adapter.
        force: replace ``path``.

    Returns:
        The folder.

    Raises:
        OutputError: the folder is taken, or a weight cannot be written in this form (a gain of nearly zero).
        UnsupportedError: parameters that trained and have no place in the file, or an adapter that is merged.
    """
    out = Path(path)
    base = check_saving(model, out, name, force=force)
    with staged_folder(out, force=force) as staging:
        write_adapter(model, staging, name, base)
    return out


def check_saving(
    model: nn.Module, out: Path, name: str, *, force: bool, carries_over: bool = False
) -> Mapping[str, Any]:
    """Refuse what cannot be saved, or not there, before anything is computed; the record of the base otherwise.

    ``carries_over``: what else lies in ``out`` stays there.

    Raises:
        OutputError, UnsupportedError: as ``save_adapter`` does.
    """
    attached = named(model, name)
    _refuse_lost_training(model)
    layers = layers_of(model, name)
    merged = next((path for path, layer in layers.items() if layer.is_merged), None)
    if merged is not None:
        raise UnsupportedError(f"an adapter is merged into {merged}: call unmerge_adapter first.")
    base = live_base(model, attached)
    nbytes = sum(4 * factor.numel() for update in updates_of(model, name).values() for factor in update.factors)
    folder = Path(base["name"] or "")
    inputs = [folder] if base["name"] and folder.is_dir() else []
    check_output(out, force=force, inputs=inputs, nbytes=nbytes, carries_over=carries_over)
    return base


@torch.no_grad()
def write_adapter(model: nn.Module, staging: Path, name: str, base: Mapping[str, Any]) -> None:
    """Write the files of a MAP directory into the empty folder ``staging``."""
    attached, updates = named(model, name), updates_of(model, name)
    if attached.method is not None:
        own = {path: update for path, update in updates.items() if isinstance(update, MethodUpdate)}
        write_method(staging, attached, attached.method, own, base)
        return
    layers = list(layers_of(model, name).values())
    saved = [_saved(layer, updates[live]) for live, layer in zip(attached.paths, layers, strict=True)]
    scalars = [scalars for item in saved for scalars in item.scalars]
    if needs_magnitude(scalars):
        _refuse_stacks(saved, scalars)
        saved = [_with_magnitude(item, layer) for item, layer in zip(saved, layers, strict=True)]
    _write_weights(staging, saved, attached)
    changed = not all(update.is_as_loaded for update in updates.values())
    entries = [
        each.to_dict() | facts
        for item, layer, update in zip(saved, layers, updates.values(), strict=True)
        for each, facts in zip(item.scalars, base_facts(layer, update, len(item.scalars)), strict=True)
    ]
    record = live_record(attached, base, entries, changed=changed)
    paths = {
        item.module.path: pattern_name(layer, item.module, attached) for item, layer in zip(saved, layers, strict=True)
    }
    source, respelled = source_config(model, attached, layers), is_respelled(attached, paths)
    config = peft_config(source, scalars, paths, base=base["name"], respelled=respelled)
    config["revision"] = base["revision"]
    if attached.adapter is not None and attached.adapter.path.is_dir():
        copy_tokenizer(attached.adapter.path, staging)
    write_file(staging / CARD_FILE, local_card(config, record, scalars))
    write_configs(staging, config, record)


def _refuse_lost_training(model: nn.Module) -> None:
    own = {id(p) for update in model.modules() if isinstance(update, Update) for p in update.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise UnsupportedError(
                f"{name} is trainable, but a MAP directory holds the adapter alone: save that parameter yourself and "
                "set its requires_grad to False first."
            )


def _saved(layer: MapLayer, update: Update) -> Saved:
    origin = update.origin
    module = origin.module if origin else _new_module(layer, update)
    if origin is not None and origin.scalars and update.is_as_loaded:
        A, B = (factor.detach().cpu().to(origin.dtype) for factor in (update.A, update.B))
        return Saved(module, origin.scalars, *_side_by_side(A, B), getattr(update, "magnitude", origin.magnitude))
    if isinstance(update, StackUpdate):
        return _saved_stack(layer, update, module)
    return _saved_dora(layer, update, module) if isinstance(update, DoraUpdate) else _saved_low_rank(update, module)


def _saved_low_rank(update: Update, module: Module) -> Saved:
    """b·BA as a·D: B takes the quotient of the gains."""
    A, B = update.A.detach().cpu().float(), update.B.detach().cpu()
    a, norm = update.exact("alpha"), product_norm(update.B.detach().cpu(), A)
    _require_gain(a, module, "its base gain")
    length = max(norm, update.floor)
    b = update.exact("beta") * (update.base_norm or 1.0) / length if length else 0.0
    B = _stored(B if b == a else B.double() * (b / a), module)
    length = product_norm(B, A)
    return Saved(module, (_scalars(module, update, a, a, length),), A, B, None)


def _saved_stack(layer: MapLayer, update: StackUpdate, module: Module) -> Saved:
    """b·BA of every weight, with β = ‖b·BA‖: α is ‖W0‖."""
    assert isinstance(layer, MapParameterLayer)  # no other layer has such an update
    A, B = update.A.detach().cpu().float(), update.B.detach().cpu()
    lengths = torch.tensor([product_norm(*pair) for pair in zip(B, A, strict=True)], dtype=torch.float64)
    betas = torch.tensor(update.betas(), dtype=torch.float64)
    gains = torch.where(lengths > 0, betas / lengths, 0.0)
    # A gain of 1 but for rounding is that of factors which are as they were.
    same = (gains - 1).abs() <= 4 * torch.finfo(torch.float64).eps
    B = _stored(torch.where(same[:, None, None], B.double(), B.double() * gains[:, None, None]), module)
    scalars = tuple(
        MapModule(
            path=module.path,
            direction="low-rank",
            rank=update.rank,
            alpha=norm,
            beta=(length := product_norm(B[number], A[number])),
            base_norm=norm,
            base_projection=update.base_projections[number],
            direction_norm=length,
            error=None,
            expert=expert,
        )
        for number, (expert, norm) in enumerate(zip(layer.target.experts, update.base_norms, strict=True))
    )
    return Saved(module, scalars, *_side_by_side(A, B), None)


def _side_by_side(A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of a stack as matrices: A has the experts in turn, B side by side, the expert counting fastest."""
    return (A, B) if A.dim() == 2 else (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1))


def _saved_dora(layer: MapLayer, update: DoraUpdate, module: Module) -> Saved:
    """W' = diag(g)(W0 + diag(c)BA) with g = a − b + b·d and c = b·d/g: a DoRA of its own, at a = b = 1."""
    with values_of(layer.base_layer, layer.path) as weight:
        A, B, magnitude = (factor.detach().to(weight.device) for factor in update.factors)
        a, b = update.exact("alpha"), update.exact("beta")
        if a != 1.0 or b != 1.0:
            norms = merged_row_norms(weight, A, B)
            d = torch.where(norms > 0, magnitude.double() / norms, 0.0)
            rows = a - b + b * d
            _require_gain(float(rows.abs().min()), module, "the gain of one of its rows")
            B = _stored(B.double() * (b * d / rows)[:, None], module)
            magnitude = (rows * merged_row_norms(weight, A, B)).to(magnitude.dtype)
        length = direction_norm(weight, A, B, magnitude)
    A, B, magnitude = A.cpu().float(), _stored(B.cpu(), module), magnitude.cpu().float()
    return Saved(module, (_scalars(module, update, 1.0, 1.0, length),), A, B, magnitude)


def _scalars(module: Module, update: Update, a: float, b: float, length: float) -> MapModule:
    return MapModule(
        path=module.path,
        direction="dora" if isinstance(update, DoraUpdate) else "low-rank",
        rank=update.rank,
        alpha=a * update.base_norm,
        beta=b * length,
        base_norm=update.base_norm,
        base_projection=update.base_projection,
        direction_norm=length,
        error=None,
    )


def _with_magnitude(item: Saved, layer: MapLayer) -> Saved:
    """The row norms of W', under which PEFT's DoRA computes it from D."""
    if item.magnitude is not None:
        return item
    with values_of(layer.base_layer, layer.path) as weight:
        norms = merged_row_norms(weight, item.A.to(weight.device), item.B.to(weight.device))
    return Saved(item.module, item.scalars, item.A, item.B, (item.scalars[0].base_gain * norms).float().cpu())


def _refuse_stacks(saved: Sequence[Saved], scalars: Sequence[MapModule]) -> None:
    stack = next((item.module.path for item in saved if item.scalars[0].expert is not None), None)
    if stack is not None:
        other = next(item for item in scalars if item.direction == "dora" or item.base_gain != 1.0)
        raise OutputError(
            f"{other.path} has a base gain of {other.base_gain:.6g}, which stock PEFT computes as a DoRA, and it has "
            f"none for the stacked parameter {stack}: train with α frozen."
        )


def _write_weights(staging: Path, saved: Sequence[Saved], attached: Attached) -> None:
    spool = SpooledFile(staging / WEIGHTS_FILE)
    try:
        for item in saved:
            for key, tensor in peft_factors(item.module, item.A, item.B):
                spool.append(key, tensor)
        if needs_magnitude([scalars for item in saved for scalars in item.scalars]):
            for item in saved:
                assert item.magnitude is not None  # if one needs it, _with_magnitude has given it to all
                spool.append(*peft_magnitude(item.module, item.magnitude))
        for key, tensor in attached.others.items():
            spool.append(key, tensor)
        spool.finish()
    finally:
        spool.close()


def _new_module(layer: MapLayer, update: Update) -> Module:
    """The record of a weight that no file has held yet, with the shapes that PEFT gives its factors."""
    weight, kind = layer.base_layer.weight, kind_of(layer.base_layer)
    kernel = tuple(weight.shape[2:]) if kind == "conv" else ()
    width = update.A.shape[1] if kind != "conv" else weight.shape[1]
    A = TensorRef(Path(), "lora_A", "F32", (update.rank, width, *kernel), 0)
    B = TensorRef(Path(), "lora_B", "F32", (update.B.shape[0], update.rank, *(1 for _ in kernel)), 0)
    return Module(layer.path, update.rank, 1.0, A, B, embedding=kind == "embedding")


def _require_gain(gain: float, module: Module, what: str) -> None:
    if not abs(gain) >= SMALLEST_GAIN:
        raise OutputError(
            f"{module.path}: {what} is {gain:.3g}, and a MAP directory stores the update divided by it: train with a "
            "smaller learning rate for the scalars, or without weight decay on them."
        )


def _stored(B: torch.Tensor, module: Module) -> torch.Tensor:
    stored = B.float()
    if not torch.isfinite(stored).all():
        raise OutputError(f"the factors of {module.path} hold NaN or infinity: the training run diverged.")
    return stored
