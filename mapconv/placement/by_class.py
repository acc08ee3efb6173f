"""Place an adapter's modules on a live model: which parameter each group of factors adapts, and how it is stored.

This is the careful way, for all that names and shapes alone cannot tell (``placement`` is the quick one).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mapconv.adapter import Adapter, Module
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.placement.agreement import attention_refusal, on_stack, on_weight, require_bijection
from mapconv.placement.by_name import misfit_report, nearest, require_all_targets
from mapconv.placement.regions import StoredParameters
from mapconv.placement.skeleton import Kind, LiveModel
from mapconv.placement.weights import PlacedModule, WeightView

_WRAPPER = ".base_layer"


def place_on_live_model(adapter: Adapter, live: LiveModel, stored: StoredParameters) -> tuple[PlacedModule, ...]:
    """Place every module of an adapter; a stack of experts gives one placed module for each.

    Raises:
        PlacementError: modules without a weight of the right shape. UnsupportedError: a layer that has no merge.
    """
    placed: list[PlacedModule] = []
    misfits: list[str] = []
    for module in adapter.modules:
        try:
            placed.extend(_place(module, adapter, live, stored))
        except PlacementError as error:
            misfits.append(str(error))
    if misfits:
        raise PlacementError(misfit_report(misfits, len(adapter.modules)))
    if any(module.method is not None for module in adapter.modules):
        # PEFT builds layers in the model's own order, which some methods go by.
        order = {path: number for number, path in enumerate(live.adaptable_paths())}
        placed.sort(key=lambda item: order[item.module.path])
    require_bijection(placed)
    taken = {item.parameter.removesuffix(".weight") for item in placed}
    taken |= {item.parameter.rpartition(".")[0] for item in adapter.whole}
    # A target inside a module that was trained in full has no factors of its own.
    saved = [f".{name}." for name in adapter.settings.modules_to_save]
    paths = [path for path in live.adaptable_paths() if not any(name in f".{path}." for name in saved)]
    require_all_targets(adapter.config, taken, paths)
    return tuple(placed)


def live_parameter(path: str, adapter: Adapter, live: LiveModel) -> str | None:
    """The parameter that a module path of the adapter adapts, or None where the live model has none."""
    depth = path.count(_WRAPPER)
    inner = path.replace(_WRAPPER, "")
    kind = live.kind(inner)
    if kind is None:
        region = live.locate(f"{inner}.weight")
        return region.parameter if region.parameter in live.shapes else None
    if kind == "attention":
        raise attention_refusal(path)
    if kind != "parameters":
        return f"{inner}.weight"
    targets = adapter.settings.target_parameters
    wrapped = [
        name
        for name in live.own_parameters(inner)
        if f"{inner}.{name}" in targets or any(f"{inner}.{name}".endswith(f".{target}") for target in targets)
    ]
    # PEFT wraps in the order of the module's parameters, so the first one ends up innermost.
    return f"{inner}.{wrapped[-1 - depth]}" if depth < len(wrapped) else None


def _place(module: Module, adapter: Adapter, live: LiveModel, stored: StoredParameters) -> Iterator[PlacedModule]:
    parameter = live_parameter(module.path, adapter, live)
    if parameter is None:
        near = nearest(module.path, live.shapes)
        raise PlacementError(f"{module.path}: {live.class_name} has no such weight{near}")
    inner = parameter.removesuffix(".weight")
    kind = live.kind(inner) if parameter.endswith(".weight") else None
    if module.method is not None:
        yield _layer_of_method(module, adapter, parameter, kind, live, stored)
        return
    if kind in ("linear", "transposed", "conv", "embedding"):
        if module.embedding != (kind == "embedding"):
            raise PlacementError(f"{module.path}: the adapter's factors are not those of a layer of kind {kind}")
        if kind == "conv" and live.groups(inner) > 1:
            raise UnsupportedError(
                f"{module.path} is a convolution with groups > 1, which PEFT itself refuses to merge."
            )
        # From here on the module goes by its name in the live model, whichever version's it was saved under.
        weight = _stored_weight(parameter, kind, live, stored)
        yield on_weight(module, adapter, parameter, weight, live_path=inner)
        return
    region = live.locate(f"{module.path.replace(_WRAPPER, '')}.weight")
    if region.index is not None:
        transposed = live.stores_in_by_out(parameter.rpartition(".")[0])
        yield on_weight(module, adapter, parameter, stored.part(region, transposed=transposed))
        return
    if len(live.shapes[parameter]) == 2:
        weight = _stored_weight(parameter, "linear", live, stored)
        yield on_weight(module, adapter, parameter, weight, pattern_name=parameter)
        return
    transposed = live.stores_in_by_out(parameter.rpartition(".")[0])
    experts = range(live.shapes[parameter][0])
    views = [stored.expert(parameter, expert, transposed=transposed) for expert in experts]
    yield from on_stack(module, adapter, parameter, views)


def _layer_of_method(
    module: Module, adapter: Adapter, parameter: str, kind: Kind | None, live: LiveModel, stored: StoredParameters
) -> PlacedModule:
    """A layer of another method than LoRA, with its weight's dimensions and its bias."""
    inner = parameter.removesuffix(".weight")
    if kind not in ("linear", "transposed", "conv", "embedding"):
        raise PlacementError(
            f"{module.path}: {adapter.method} adapts whole layers, and the model has none of that name"
        )
    if kind == "conv" and live.groups(inner) > 1:
        raise UnsupportedError(f"{module.path} is a convolution with groups > 1, which PEFT itself refuses to merge.")
    weight = _stored_weight(parameter, kind, live, stored)
    shape = live.shapes[parameter] if kind == "conv" else weight.shape
    A = replace(module.lora_A, shape=(0, *shape[1:]))
    B = replace(module.lora_B, shape=(shape[0], 0, *(1 for _ in shape[2:])))
    rank = module.rank or min(weight.shape)
    module = replace(module, rank=rank, lora_A=A, lora_B=B, embedding=kind == "embedding")
    placed = on_weight(module, adapter, parameter, weight, live_path=inner)
    bias = f"{inner}.bias"
    if bias not in live.shapes:
        return placed
    return replace(placed, bias=stored.single(bias))


def _stored_weight(parameter: str, kind, live: LiveModel, stored: StoredParameters) -> WeightView:
    """The weight under its own name, or under one that it is tied to."""
    for name in (parameter, *live.tied(parameter)):
        if stored.holds(name):
            return stored.weight(name, kind)
    raise PlacementError(f"{parameter}: no tensor of the base holds it{nearest(parameter, stored.tensor_names)}")
