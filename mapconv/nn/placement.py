"""Which layer of a live model each of an adapter's modules lands on, and how the model spells the adapter's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from mapconv.adapter import Adapter, Module
from mapconv.errors import CheckpointError, PlacementError, UnsupportedError
from mapconv.nn.bases import is_grouped, kind_of, matrix_shape, weight_of
from mapconv.nn.stacks import StackedParameter
from mapconv.placement.agreement import stack_initialization_refusal, stack_rank_fault
from mapconv.placement.by_name import place, require_all_targets
from mapconv.placement.skeleton import LiveModel

#: A parameter's name in the adapter's file -> its name in the model.
Rename = Callable[[str], str]


def place_on_layers(
    model: nn.Module, adapter: Adapter, layers: Mapping[str, nn.Module], stacks: Mapping[str, StackedParameter]
) -> tuple[list[tuple[Module, str]], Rename]:
    """(module, path of its layer or parameter) for every module of the adapter, and the renaming of its parameters.

    A leading part of the path may be missing or added (``model.model`` in place of ``model``), or the names may be
    those of another version of transformers, which its conversion tables know; then a module goes by its live path.

    Raises:
        PlacementError: the modules that fit no layer, all of them listed. UnsupportedError: a grouped convolution.
    """
    if any(module.method is not None for module in adapter.modules):
        return _place_by_name(adapter, layers)
    shapes = {f"{path}.weight": matrix_shape(layer) for path, layer in layers.items()}
    shapes |= {f"{path}.weight": stack.matrix_shape for path, stack in stacks.items()}
    try:
        names, renaming = place({module.path: module.weight_shape for module in adapter.modules}, shapes)
    except PlacementError as error:
        other = _other_version(model)
        if other is None:
            raise
        regions = {module.path: other.locate(f"{module.path}.weight") for module in adapter.modules}
        part = next((path for path, region in regions.items() if region.index is not None), None)
        if part is not None:
            raise UnsupportedError(
                f"{adapter.path} adapts {part} by itself, one expert of a stack that this version of transformers runs "
                "as one parameter: merge it with `mapconv merge` and load the merged model."
            ) from None
        rename = _renaming(other)
        respelled = {path: region.parameter for path, region in regions.items()}
        if not set(respelled.values()) <= shapes.keys() or len(set(respelled.values())) < len(respelled):
            raise error from None
        modules = [replace(m, path=respelled[m.path].removesuffix(".weight")) for m in adapter.modules]
        names, _ = place({module.path: module.weight_shape for module in modules}, shapes)
        paths = list(layers)
    else:
        modules, rename = list(adapter.modules), renaming.to_checkpoint
        paths = [renaming.to_adapter(path) for path in layers]
    # A target inside a module that was trained in full has no factors of its own.
    saved = [f".{name}." for name in adapter.settings.modules_to_save]
    paths = [path for path in paths if not any(name in f".{path}." for name in saved)]
    require_all_targets(adapter.config, names, paths)
    placed = [(module, names[module.path].removesuffix(".weight")) for module in modules]
    for module, live in placed:
        if live in stacks:
            _check_stack(module, stacks[live], adapter)
        else:
            _check_kind(module, live, layers[live])
    return placed, rename


def _place_by_name(adapter: Adapter, layers: Mapping[str, nn.Module]) -> tuple[list[tuple[Module, str]], Rename]:
    """Layers of another method than LoRA: whether the tensors of each fit is PEFT's to say."""
    unknown = (0, 0)
    names, renaming = place(
        {module.path: unknown for module in adapter.modules}, {f"{path}.weight": unknown for path in layers}
    )
    placed = [(module, names[module.path].removesuffix(".weight")) for module in adapter.modules]
    return placed, renaming.to_checkpoint


def _other_version(model: nn.Module) -> LiveModel | None:
    """transformers' own renaming of the names of its older versions, for one of its models."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or not hasattr(model, "base_model_prefix"):
        return None
    try:
        return LiveModel(config.to_dict(), type(model).__name__)
    except (CheckpointError, KeyError):
        return None


def _renaming(other: LiveModel) -> Rename:
    return lambda name: other.locate(name).parameter


def _check_stack(module: Module, stack: StackedParameter, adapter: Adapter) -> None:
    if adapter.settings.initialization is not None:
        raise stack_initialization_refusal(module.path, adapter.settings.initialization)
    rank = adapter.settings.rank_of(stack.parameter)
    if module.rank != rank * stack.count:
        raise PlacementError(stack_rank_fault(module, stack.count, stack.parameter, rank))


def _check_kind(module: Module, live: str, layer: nn.Module) -> None:
    kind, weight = kind_of(layer), weight_of(layer)
    kernel = tuple(weight.shape[1:]) if kind == "conv" else (module.lora_A.shape[1],)
    if module.embedding != (kind == "embedding") or module.lora_A.shape[1:] != kernel:
        raise PlacementError(
            f"{module.path}: the adapter's factors are not those of {live}, a {type(layer).__name__} of weight "
            f"{list(weight.shape)}."
        )
    if is_grouped(layer):
        raise UnsupportedError(f"{module.path} is a convolution with groups > 1, which PEFT itself refuses to merge.")
