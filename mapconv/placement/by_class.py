"""Place an adapter's modules on a live model: which parameter each group of factors adapts, and how it is stored.

This is the careful way, for all that names and shapes alone cannot tell (``placement`` is the quick one).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mapconv.adapter import Adapter, Module
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.placement.by_name import misfit_report, nearest, require_all_targets
from mapconv.placement.regions import StoredParameters
from mapconv.placement.skeleton import LiveModel
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
    _require_bijection(placed)
    taken = {item.parameter.removesuffix(".weight") for item in placed}
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
    if kind in ("linear", "transposed", "conv", "embedding"):
        if module.embedding != (kind == "embedding"):
            raise PlacementError(f"{module.path}: the adapter's factors are not those of a layer of kind {kind}")
        if kind == "conv" and live.groups(inner) > 1:
            raise UnsupportedError(
                f"{module.path} is a convolution with groups > 1, which PEFT itself refuses to merge."
            )
        # From here on the module goes by its name in the live model, whichever version's it was saved under.
        weight = _stored_weight(parameter, kind, live, stored)
        yield from _one(module, adapter, parameter, weight, live_path=inner)
        return
    region = live.locate(f"{module.path.replace(_WRAPPER, '')}.weight")
    if region.index is not None:
        transposed = live.stores_in_by_out(parameter.rpartition(".")[0])
        yield from _one(module, adapter, parameter, stored.part(region, transposed=transposed))
        return
    if len(live.shapes[parameter]) == 2:
        weight = _stored_weight(parameter, "linear", live, stored)
        yield from _one(module, adapter, parameter, weight, pattern_name=parameter)
        return
    yield from _experts(module, adapter, parameter, live, stored)


def _one(
    module: Module,
    adapter: Adapter,
    parameter: str,
    weight: WeightView,
    *,
    pattern_name: str | None = None,
    live_path: str | None = None,
) -> Iterator[PlacedModule]:
    if weight.shape != module.weight_shape:
        raise PlacementError(
            f"{module.path}: {weight.name} is {list(weight.shape)} (out, in), the adapter fits "
            f"{list(module.weight_shape)}"
        )
    settings, name = adapter.settings, pattern_name or module.path
    if settings.rank_of(name) != module.rank:
        raise PlacementError(
            f"{module.path}: the factors have rank {module.rank}, the configuration says {settings.rank_of(name)}"
        )
    # Only linear layers take part in an initialization that changes the base; PEFT ignores it elsewhere.
    init = settings.initialization if not module.embedding else None
    module = replace(module, path=live_path or module.path)
    yield PlacedModule(module, weight, parameter, module.rank, settings.scaling_of(name), initialization=init)


def _experts(
    module: Module, adapter: Adapter, parameter: str, live: LiveModel, stored: StoredParameters
) -> Iterator[PlacedModule]:
    experts = live.shapes[parameter][0]
    settings = adapter.settings
    if settings.initialization is not None:
        raise UnsupportedError(
            f"{module.path}: init_lora_weights={settings.initialization!r} on a stack of experts has no defined base: "
            "export the adapter as plain LoRA first."
        )
    rank = settings.rank_of(parameter)
    if module.rank != rank * experts:
        raise PlacementError(
            f"{module.path}: {module.rank} rows of lora_A for {experts} experts of {parameter}, expected {rank} each"
        )
    transposed = live.stores_in_by_out(parameter.rpartition(".")[0])
    scaling = settings.scaling_of(parameter)
    for expert in range(experts):
        weight = stored.expert(parameter, expert, transposed=transposed)
        if weight.shape != module.weight_shape:
            raise PlacementError(
                f"{module.path}: an expert of {weight.name} is {list(weight.shape)} (out, in), the adapter fits "
                f"{list(module.weight_shape)}"
            )
        yield PlacedModule(module, weight, parameter, rank, scaling, expert=expert, experts=experts)


def _stored_weight(parameter: str, kind, live: LiveModel, stored: StoredParameters) -> WeightView:
    """The weight under its own name, or under one that it is tied to."""
    for name in (parameter, *live.tied(parameter)):
        if stored.holds(name):
            return stored.weight(name, kind)
    raise PlacementError(f"{parameter}: no tensor of the base holds it{nearest(parameter, stored.tensor_names)}")


def _require_bijection(placed: list[PlacedModule]) -> None:
    owners: dict[tuple, str] = {}
    for item in placed:
        key = (item.parameter, item.expert, tuple((p.tensor.name, p.index, p.offset) for p in item.weight.pieces))
        if key in owners:
            raise PlacementError(f"{item.module.path} and {owners[key]} both adapt {item.weight.name}.")
        owners[key] = item.module.path
