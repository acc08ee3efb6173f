"""One module on the weight that it adapts: shape, rank and scaling must agree, whichever way the weight was found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from mapconv.adapter import Adapter, Module
from mapconv.errors import PlacementError, UnsupportedError
from mapconv.placement.weights import PlacedModule, WeightView


def on_weight(
    module: Module,
    adapter: Adapter,
    parameter: str,
    weight: WeightView,
    *,
    pattern_name: str | None = None,
    live_path: str | None = None,
) -> PlacedModule:
    """A module on a weight of its own; ``pattern_name`` is what PEFT looks ranks up by, where that is not the path.

    Raises:
        PlacementError: another shape, or another rank than the configuration says.
    """
    if module.method is not None:
        # Whether its tensors fit the weight, PEFT says (``placement.tuned``): their shapes are the method's own.
        return PlacedModule(replace(module, path=live_path or module.path), weight, parameter, module.rank, 1.0)
    if weight.shape != module.weight_shape:
        raise PlacementError(
            f"{module.path}: {weight.name} is {list(weight.shape)} (out, in), the adapter fits "
            f"{list(module.weight_shape)}"
        )
    settings, name = adapter.settings, pattern_name or module.path
    if not module.has_factors:
        # Nothing that the configuration says is about it.
        return PlacedModule(replace(module, path=live_path or module.path), weight, parameter, 0, module.scaling)
    by_module = settings.by_module
    if not by_module and settings.rank_of(name) != module.rank:
        raise PlacementError(
            f"{module.path}: the factors have rank {module.rank}, the configuration says {settings.rank_of(name)}"
        )
    # Only linear layers take part in an initialization that changes the base; PEFT ignores it elsewhere.
    init = settings.initialization if not module.embedding else None
    module = replace(module, path=live_path or module.path)
    scaling = module.scaling if by_module else settings.scaling_of(name)
    return PlacedModule(module, weight, parameter, module.rank, scaling, initialization=init)


def on_stack(module: Module, adapter: Adapter, parameter: str, weights: Sequence[WeightView]) -> Iterator[PlacedModule]:
    """A module on every expert's weight of a stacked parameter.

    Raises:
        PlacementError: another shape or rank. UnsupportedError: an initialization that changed the base.
    """
    settings, experts = adapter.settings, len(weights)
    if settings.initialization is not None:
        raise stack_initialization_refusal(module.path, settings.initialization)
    rank = settings.rank_of(parameter) if module.has_factors else 0
    if module.rank != rank * experts:
        raise PlacementError(stack_rank_fault(module, experts, parameter, rank))
    scaling = settings.scaling_of(parameter) if module.has_factors else module.scaling
    for expert, weight in enumerate(weights):
        if weight.shape != module.weight_shape:
            raise PlacementError(
                f"{module.path}: an expert of {weight.name} is {list(weight.shape)} (out, in), the adapter fits "
                f"{list(module.weight_shape)}"
            )
        yield PlacedModule(module, weight, parameter, rank, scaling, expert=expert, experts=experts)


def stack_rank_fault(module: Module, experts: int, parameter: str, rank: int) -> str:
    """What is wrong with factors of another rank than the configuration gives a stacked parameter."""
    return f"{module.path}: {module.rank} rows of lora_A for {experts} experts of {parameter}, expected {rank} each"


def stack_initialization_refusal(path: str, initialization: str) -> UnsupportedError:
    """Why an initialization that changed the base cannot be undone on a stack."""
    return UnsupportedError(
        f"{path}: init_lora_weights={initialization!r} on a stack of experts has no defined base: "
        "export the adapter as plain LoRA first."
    )


def attention_refusal(path: str) -> UnsupportedError:
    """Why a LoRA on nn.MultiheadAttention has no merge: PEFT 0.21's forward pass adds that of its out_proj twice."""
    return UnsupportedError(
        f"{path} is an nn.MultiheadAttention: PEFT's forward pass applies the update of its output projection twice, "
        "so that what was trained is not what the file says; adapt linear layers instead."
    )


def require_bijection(placed: Iterable[PlacedModule]) -> None:
    """Refuse two modules on one weight."""
    owners: dict[tuple, str] = {}
    for item in placed:
        key = (item.parameter, item.expert, tuple((p.tensor.name, p.index, p.offset) for p in item.weight.pieces))
        if key in owners:
            raise PlacementError(f"{item.module.path} and {owners[key]} both adapt {item.weight.name}.")
        owners[key] = item.module.path
