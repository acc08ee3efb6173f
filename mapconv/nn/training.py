"""MAP as a trainable method: the layers that a configuration names, and the state that training starts from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import nn

from mapconv.errors import PlacementError, UnsupportedError
from mapconv.formats.peft import natural_order
from mapconv.nn.attaching import Attached, adaptable, attach, check_model, has_adapters, state_of
from mapconv.nn.bases import base_fingerprint, is_grouped, kind_of, matrix_shape, row_squares, values_of
from mapconv.nn.checkpoints import serve_trainers
from mapconv.nn.config import MapConfig
from mapconv.nn.dora import DoraUpdate
from mapconv.nn.methods import MethodUpdate, PeftMethod
from mapconv.nn.updates import Update

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def get_map_model(model: nn.Module, config: MapConfig, *, name: str = "default") -> nn.Module:
    """Attach fresh, trainable MAP updates to ``model`` in place, and freeze everything else.

    Training starts from the base model itself, with α = ‖W0‖. For the direction ``low-rank``, ``init="paper"`` is the
    start of MAP's authors: A Kaiming-uniform, B = 0, β = 1, and a floor under ‖BA‖, below which W' = W0 + (β/eps)·BA.
    ``init="random"`` has random A and B and β = 0: β gets a gradient at once, A and B as soon as β ≠ 0. For ``dora``,
    as DoRA itself: random A, B = 0, magnitudes ‖W0‖_row.

    The parameters are named ``<layer>.updates.<name>.A``, ``.B``, ``.relative_alpha``, ``.relative_beta`` (with
    ``units="absolute"``: ``.absolute_alpha``, ``.absolute_beta``) and, for ``dora``, ``.magnitude``. Do not apply
    weight decay to the scalars: it would pull the base weight itself to zero.
    Train with any loop, ``transformers.Trainer`` or TRL's, then call ``save_adapter``. The model's ``save_pretrained``,
    which trainers call, writes a MAP directory while an adapter is attached.

    Args:
        model: a model in memory; PEFT's or another adapter's layers must not be on it.
        config: what to train.
        name: what to call the adapter.

    Returns:
        The same model.

    Raises:
        MapconvError: no layer matches, or one that does cannot be adapted; the model is then as it was.
    """
    check_model(model, name)
    if has_adapters(model) and state_of(model).replicated is not None:
        raise UnsupportedError(
            "the model runs with the repeated layers of another adapter (layer_replication): detach it first."
        )
    layers = _targets(model, config)
    grouped = next((path for path, layer in layers.items() if is_grouped(layer)), None)
    if grouped is not None:
        raise UnsupportedError(f"{grouped} is a convolution with groups > 1, which PEFT refuses to merge: exclude it.")
    generator, method = torch.Generator().manual_seed(config.seed), None
    if config.is_method:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            method = PeftMethod(config.direction, layers)
        updates = {path: _fresh_of_method(method, layer, path, config) for path, layer in layers.items()}
    else:
        updates = {path: _fresh(layer, path, config, generator) for path, layer in layers.items()}
    options = vars(config) | ({"direction": method.name} if method else {})
    attach(model, name, updates, Attached(None, tuple(updates), options, method=method), "all")
    for update in updates.values():
        for scalar in config.frozen:
            update.scalar(scalar).requires_grad_(False)
    serve_trainers(model)
    return model


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many of a model's parameters are trained, in PEFT's words."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained, total = sum(count for count, trains in counts if trains), sum(count for count, _ in counts)
    print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / max(1, total):.4f}")


def _fresh(layer: nn.Module, path: str, config: MapConfig, generator: torch.Generator) -> Update:
    height, width = matrix_shape(layer)
    found = base_fingerprint(layer, path)
    if not math.isfinite(found.square):
        raise PlacementError(f"{path}: the model's weight holds NaN or infinity.")
    A = torch.empty(config.rank, width)
    if config.direction == "dora":
        A.normal_(std=width**-0.5, generator=generator)
        with values_of(layer, path) as weight:
            magnitude = row_squares(weight).sqrt().float().cpu()
        B = torch.zeros(height, config.rank)
        update = DoraUpdate(A, B, magnitude, relative_alpha=1.0, relative_beta=1.0, base_norm=found.norm)
    else:
        B = torch.zeros(height, config.rank)
        if config.init == "paper":
            # Kaiming's uniform distribution with a = √5, as LoRA has it.
            A.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        else:
            A.normal_(std=width**-0.5, generator=generator)
            B.normal_(std=height**-0.5, generator=generator)
        beta = config.start(found.norm) / (found.norm or 1.0)
        scalars = {"relative_alpha": 1.0, "relative_beta": beta, "base_norm": found.norm}
        settings = {"detach_norm": config.detach_norm, "floor": config.floor, "units": config.units}
        update = Update(A, B, **scalars, **settings)
    update.base_projection = found.projection
    return update


def _fresh_of_method(method: PeftMethod, layer: nn.Module, path: str, config: MapConfig) -> MethodUpdate:
    found = base_fingerprint(layer, path)
    if not math.isfinite(found.square):
        raise PlacementError(f"{path}: the model's weight holds NaN or infinity.")
    beta = config.start(found.norm) / (found.norm or 1.0)
    scalars = {"relative_alpha": 1.0, "relative_beta": beta, "base_norm": found.norm}
    update = MethodUpdate(method, path, **scalars, floor=config.floor, units=config.units)
    if config.beta is None and (length := update.length()):
        update.restart(1.0, length / (found.norm or 1.0))
    return update


def _targets(model: nn.Module, config: MapConfig) -> Mapping[str, nn.Module]:
    """The layers to adapt by path."""
    candidates = adaptable(model)
    heads = _output_heads(model)
    found = {}
    for path, layer in candidates.items():
        if config.targets == "all-linear":
            chosen = kind_of(layer) in ("linear", "transposed") and not any(layer is head for head in heads)
        else:
            chosen = _matches(config.targets, path)
        if chosen and not _matches(config.exclude, path) and _in_layers(path, config.layers):
            found[path] = layer
    if not found:
        raise PlacementError(
            f"no layer of this {type(model).__name__} matches targets={config.targets!r}: its layers end in "
            f"{', '.join(sorted({path.rpartition('.')[2] for path in candidates})[:12])}."
        )
    if not isinstance(config.targets, str):
        idle = [target for target in config.targets if not any(_matches((target,), path) for path in candidates)]
        if idle:
            raise PlacementError(f"targets names {', '.join(map(repr, idle))}, which no layer's path ends in.")
    # In the order in which a file of them is read.
    return dict(sorted(found.items(), key=lambda item: natural_order(item[0])))


def _matches(names: str | tuple[str, ...], path: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _in_layers(path: str, layers: tuple[int, ...] | None) -> bool:
    number = _LAYER.search(path)
    return layers is None or (number is not None and int(number[1]) in layers)


def _output_heads(model: nn.Module) -> list[nn.Module]:
    """What ``all-linear`` leaves out, as PEFT does: the output embedding, or a classifier's head."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(output, "base_layer", output)
    heads = [] if head is None else [head]
    if type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")):
        prefix = getattr(model, "base_model_prefix", "")
        heads += [layer for path, layer in adaptable(model).items() if not path.startswith(f"{prefix}.")]
    return heads
