"""Several adapters of one base as one: which of them adapt each weight, and the tensors that they bring whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mapconv.adapter import TensorRef
from mapconv.errors import AdapterError, UnsupportedError
from mapconv.formats.config import parse_settings
from mapconv.formats.peft import CONFIG_FILE
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.weights import PlacedModule, WeightView

#: Settings that say which modules an adapter has, or what its tensors mean; those of the first adapter cannot stand for
#: all, and are written anew.
_OF_MODULES = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters",
    "modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "lora_bias",
)  # fmt: skip
#: Settings that have to be the same in all, because no two of them fit in one configuration.
_COMMON = ("layer_replication", "task_type", "auto_mapping", "fan_in_fan_out")
_TOKENS = "trainable_token_indices"


@dataclass(frozen=True)
class Shared:
    """One weight: what it becomes (without factors), and each adapter's number and own module on it."""

    item: PlacedModule
    parts: tuple[tuple[int, PlacedModule], ...]

    @property
    def rank(self) -> int:
        """The ranks of all parts together."""
        return sum(part.effective_rank for _, part in self.parts)


@dataclass(frozen=True)
class WholeTensors:
    """A tensor that some adapters bring as it is, by PEFT's key, from each of them by its number.

    Trained rows of an embedding have ``rows``, and the base's tensor (None: they are all of a tensor).
    """

    key: str
    refs: Mapping[int, TensorRef]
    rows: tuple[int, ...] = ()
    base: TensorRef | None = None


def shared_weights(placed: Sequence[PlacedAdapter]) -> tuple[Shared, ...]:
    """Every weight that an adapter adapts, in the order of the first one that does.

    Raises:
        AdapterError: two weights of one name. UnsupportedError: a stack of experts that not all have in the same form.
    """
    parts: dict[tuple, list[tuple[int, PlacedModule]]] = defaultdict(list)
    for number, adapter in enumerate(placed):
        for item in adapter.modules:
            parts[_place(item.weight), item.expert].append((number, item))
    shared = [Shared(_without_factors(own[0][1]), tuple(own)) for own in parts.values()]
    owners: dict[tuple, Shared] = {}
    for weight in shared:
        if owners.setdefault(weight.item.key, weight) is not weight:
            raise AdapterError(f"the adapters call two weights {weight.item.module.path}: combine them on one base.")
        if len({part.experts for _, part in weight.parts}) > 1:
            raise UnsupportedError(f"{weight.item.module.path} is a stack of experts for some of the adapters alone.")
    return tuple(shared)


def whole_tensors(placed: Sequence[PlacedAdapter], shared: Sequence[Shared]) -> tuple[WholeTensors, ...]:
    """Every tensor that an adapter brings besides its factors.

    Raises:
        UnsupportedError: trained token rows that no one adapter can have.
    """
    _trained_tokens(placed, shared)
    refs: dict[str, dict[int, TensorRef]] = defaultdict(dict)
    trained: dict[str, tuple[tuple[int, ...], TensorRef]] = {}
    nothing: tuple[tuple[int, ...], None] = ((), None)
    for number, adapter in enumerate(placed):
        found = {
            item.tensor.name: (item.rows, adapter.target.encoded.get(name) or adapter.target.tensors[name])
            for name, items in adapter.target.rows.items()
            for item in items
            if item.rows is not None
        }
        for key, ref in adapter.adapter.others.items():
            refs[key][number] = ref
            if ref.name in found:
                trained[key] = found[ref.name]
    found_rows = ((key, own, trained.get(key, nothing)) for key, own in refs.items())
    return tuple(WholeTensors(key, own, rows, base) for key, own, (rows, base) in found_rows)


def combined_adapter(
    placed: Sequence[PlacedAdapter], shared: Sequence[Shared], carried: Mapping[str, TensorRef]
) -> PlacedAdapter:
    """The adapter that several become, before its factors are known; ``carried`` tensors go over as they are.

    Raises:
        UnsupportedError: settings that no one configuration can hold.
    """
    first = placed[0].adapter
    for name in _COMMON:
        for other in placed[1:]:
            if (other.adapter.config.get(name) or None) != (first.config.get(name) or None):
                raise UnsupportedError(
                    f"{first.path} and {other.adapter.path} differ in {name}, and one adapter can only have one: "
                    "combine adapters that agree in it."
                )
    kept = {key: value for key, value in first.config.items() if key not in _OF_MODULES}
    kept[_TOKENS] = _trained_tokens(placed, shared)
    # A file of another program has no configuration of PEFT's.
    config: dict[str, Any] = (
        {"peft_type": "LORA"}
        | kept
        | {
            "target_modules": _targets(placed, shared),
            "target_parameters": _union(placed, "target_parameters"),
            "modules_to_save": _union(placed, "modules_to_save"),
            "lora_bias": any(part.module.bias is not None for item in shared for _, part in item.parts),
        }
    )
    config = {key: value for key, value in config.items() if value is not None}
    adapter = replace(
        first,
        method="LoRA",
        config=config,
        settings=parse_settings(config, Path(first.path, CONFIG_FILE)),
        modules=tuple({item.item.module.path: item.item.module for item in shared}.values()),
        whole=(),
        others=dict(carried),
        map_modules=(),
        map_config=None,
    )
    return PlacedAdapter(adapter, placed[0].target, tuple(item.item for item in shared))


def _trained_tokens(placed: Sequence[PlacedAdapter], shared: Sequence[Shared]) -> Any:
    """The indices of the trained token rows, which the adapters have in common that have some.

    Raises:
        UnsupportedError: other indices in each, or factors of another adapter on the same embedding.
    """
    having = [item for item in placed if item.adapter.config.get(_TOKENS)]
    for other in having[1:]:
        if other.adapter.config[_TOKENS] != having[0].adapter.config[_TOKENS]:
            raise UnsupportedError(
                f"{having[0].adapter.path} and {other.adapter.path} train other token rows ({_TOKENS}), and one "
                "adapter has one list of them: combine adapters that train the same."
            )
    for item in having:
        for weight in shared:
            names = {piece.tensor.name for piece in weight.item.weight.pieces}
            others = [placed[number] for number, _ in weight.parts if placed[number] is not item]
            if others and not names.isdisjoint(item.target.rows):
                raise UnsupportedError(
                    f"{item.adapter.path} trains token rows of {weight.item.weight.name}, which "
                    f"{others[0].adapter.path} has factors for: no one adapter has both."
                )
    return having[0].adapter.config[_TOKENS] if having else None


def _place(weight: WeightView) -> tuple:
    return tuple((p.tensor.file, p.tensor.name, p.index, p.offset, p.start, p.stop) for p in weight.pieces)


def _without_factors(item: PlacedModule) -> PlacedModule:
    """The weight as a module of rank 0: the shapes of its factors stay, but for their rank."""
    module = item.module
    A = replace(module.lora_A, shape=(0, *module.lora_A.shape[1:]))
    B = replace(module.lora_B, shape=(module.lora_B.shape[0], 0, *module.lora_B.shape[2:]))
    emptied = replace(module, rank=0, scaling=1.0, lora_A=A, lora_B=B, magnitude=None, bias=None)
    return replace(item, module=emptied, rank=0, scaling=1.0, initialization=None, scalars=None)


def _targets(placed: Sequence[PlacedAdapter], shared: Sequence[Shared]) -> Any:
    """The first adapter's own words where they are everybody's, else every module by its whole name."""
    own = {tuple(sorted(item.module.path for item in adapter.modules)) for adapter in placed}
    targets = placed[0].adapter.config.get("target_modules")
    plain = not any(placed[0].adapter.config.get(name) for name in _OF_MODULES[1:4])
    if len(own) == 1 and plain and isinstance(targets, list):
        return targets
    return list(dict.fromkeys(item.item.module.path for item in shared if item.item.experts == 1))


def _union(placed: Sequence[PlacedAdapter], name: str) -> list[str] | None:
    return list(dict.fromkeys(word for item in placed for word in item.adapter.config.get(name) or [])) or None
