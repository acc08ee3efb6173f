"""Put adapters on their base: quickly by names and shapes where those suffice, else by the model's own class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter, Module
from mapconv.checkpoint.gguf.model import notes_beside
from mapconv.checkpoint.index import Checkpoint
from mapconv.errors import AdapterError, CheckpointError, PlacementError, UnsupportedError
from mapconv.formats import read_adapter
from mapconv.hub.locate import Fetch, open_base
from mapconv.hub.reference import HubReference
from mapconv.placement.authors_scalars import with_gains
from mapconv.placement.bases import plain_base
from mapconv.placement.by_name import linear_paths, place, require_all_targets
from mapconv.placement.experts_in_turn import in_own_stacks
from mapconv.placement.head_rows import in_own_order
from mapconv.placement.skeleton import knows_type, names_class, typed_model_config
from mapconv.placement.starting_point import resolve_target
from mapconv.placement.stored_model import stored_target
from mapconv.placement.target_model import Placed, TargetModel, plain_target, vocabulary_sizes
from mapconv.placement.tuned import check_tuned
from mapconv.placement.weights import Piece, PlacedModule, WeightView
from mapconv.runtime.collector import collector_paused
from mapconv.spelling import Rescaling
from mapconv.wording import counted

FLOAT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
#: And torch's names by those of safetensors headers.
FLOAT_NAMES = {stored: name for name, stored in FLOAT_DTYPES.items()}
#: transformers' model types whose Conv1D layers store a weight transposed, which a square one does not show.
_TRANSPOSING = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")


@dataclass(frozen=True)
class PlacedAdapter:
    """An adapter together with the base that it fits; with a MAP adapter, every module has its scalars."""

    adapter: Adapter
    target: TargetModel
    modules: tuple[PlacedModule, ...]


#: What magnitudes mean where a file does not say: the trainer's forward pass.
AS_TRAINED = Rescaling(axis=None)


def place_adapter(
    source: Path,
    base: str | Path | None,
    *,
    allow_pickle: bool = False,
    fetch: Fetch = "whole",
    dora: Rescaling = AS_TRAINED,
) -> PlacedAdapter:
    """Read one adapter and the base's headers, and place every tensor; as ``place_adapters``."""
    return place_adapters([source], base, allow_pickle=allow_pickle, fetch=fetch, dora=dora)[0]


def place_adapters(
    sources: Sequence[Path],
    base: str | Path | HubReference | None,
    *,
    allow_pickle: bool = False,
    fetch: Fetch = "whole",
    root: Path | None = None,
    dora: Rescaling = AS_TRAINED,
) -> tuple[PlacedAdapter, ...]:
    """Read adapters and the base's headers, and place every tensor of each on one target model.

    ``dora`` says what the magnitudes of their DoRAs mean, ``fetch`` how much of a base on the Hub comes here
    (``hub.locate``), and ``root`` where byte ranges of it lie (``hub.ranges``).

    Raises:
        MapconvError: of the kind that fits; nothing has been computed or written.
    """
    with collector_paused():
        adapters = [read_as(source, dora, allow_pickle=allow_pickle) for source in sources]
        first = adapters[0]
        checkpoint = open_base(base, first.base, first.revision, sources[0], fetch=fetch, root=root)
        return _place_adapters(adapters, checkpoint)


def place_apart(
    sources: Sequence[Path], base: str | Path | None, *, allow_pickle: bool = False, fetch: Fetch = "ranges"
) -> tuple[PlacedAdapter, ...]:
    """As ``place_adapters``, but each adapter by itself: what they do to one weight or bring whole need not go
    together."""
    with collector_paused():
        adapters = [read_adapter(source, allow_pickle=allow_pickle) for source in sources]
        first = adapters[0]
        checkpoint, config = plain_base(open_base(base, first.base, first.revision, sources[0], fetch=fetch))
        found = [_place([adapter], checkpoint, config) for adapter in adapters]
        for _, placed in found:
            _refuse_other_dtypes(placed)
        return tuple(
            PlacedAdapter(own, target, _with_scalars(own, items, checkpoint)) for target, ((own, items),) in found
        )


def place_described(adapter: Adapter, checkpoint: Checkpoint, config: Mapping[str, Any]) -> PlacedAdapter:
    """An adapter that is no folder's on a base whose headers are read (``placement.bases.plain_base``).

    Raises:
        MapconvError: a tensor of it that has no place.
    """
    with collector_paused():
        target, ((placed, modules),) = _place([adapter], checkpoint, config)
    _refuse_other_dtypes([(placed, modules)])
    return PlacedAdapter(placed, target, modules)


def place_further(placed: PlacedAdapter, modules: Sequence[Module]) -> tuple[PlacedModule, ...]:
    """Where modules lie that the adapter has not got itself (``Module.without_factors``), on the same base.

    Raises:
        PlacementError: one that the base has no weight of its shape for.
    """
    adapter = replace(placed.adapter, modules=(*placed.adapter.modules, *modules))
    config = typed_model_config(placed.target.folder)
    with collector_paused():
        _, ((_, found),) = _place([adapter], placed.target.checkpoint, config)
    further = tuple(item for item in found if not item.module.has_factors)
    _refuse_other_dtypes([(adapter, further)])
    return further


def read_as(source: Path, dora: Rescaling, *, allow_pickle: bool = False) -> Adapter:
    """An adapter with what its magnitudes mean: the axis where its file does not tell, and the norm.

    Raises:
        UnsupportedError: the file tells another axis.
    """
    adapter = read_adapter(source, allow_pickle=allow_pickle)
    if dora == AS_TRAINED or adapter.method == "MAP":
        return adapter
    modules = []
    for module in adapter.modules:
        own = module.rescaling.axis
        if module.magnitude is not None:
            if None not in (own, dora.axis) and own != dora.axis:
                raise UnsupportedError(
                    f"{module.magnitude.file}: {module.magnitude.name} is {list(module.magnitude.shape)}, which are "
                    f"magnitudes of {own}puts: leave --dora-axis {dora.axis} out."
                )
            module = replace(module, rescaling=Rescaling(own or dora.axis, dora.norm))
        modules.append(module)
    return replace(adapter, modules=tuple(modules))


def _place_adapters(adapters: Sequence[Adapter], stored: Checkpoint) -> tuple[PlacedAdapter, ...]:
    checkpoint, config = plain_base(stored)
    target, placed = _place(adapters, checkpoint, config)
    _refuse_other_dtypes(placed)
    _refuse_shared(placed)
    for _, modules in placed:
        check_tuned(modules)
    notes = notes_beside(stored.folder, None if stored.source is None else stored.source.require)
    return tuple(
        PlacedAdapter(
            replace(adapter, notes=(*adapter.notes, *notes)), target, _with_scalars(adapter, modules, checkpoint)
        )
        for adapter, modules in placed
    )


def _place(adapters: Sequence[Adapter], checkpoint: Checkpoint, config: Mapping[str, Any]) -> Placed:
    """The quick way where it suffices, else by the model's class, or where there is none by shapes."""
    adapters = [in_own_stacks(in_own_order(adapter, config), config) for adapter in adapters]
    if any(adapter.is_spelled for adapter in adapters):
        return stored_target(checkpoint, adapters, config)
    plain = _place_plain(adapters, checkpoint, config)
    if plain is not None:
        return plain
    if names_class(config):
        return resolve_target(checkpoint, adapters)
    try:
        return stored_target(checkpoint, adapters, config)
    except PlacementError:
        # A class of somebody's own over a model that transformers knows: its names may be those of an older version.
        if not knows_type(config):
            raise
        return resolve_target(checkpoint, adapters)


def _is_plain(adapter: Adapter, config: Mapping[str, Any]) -> bool:
    """Whether names and shapes alone may tell where the adapter goes: linear factors on weights stored as they are."""
    # A causal language model has the same names in its file as in the model, whichever transformers wrote it; composite
    # models and others need not, and stock PEFT goes by the model's.
    if not all(name.endswith("ForCausalLM") for name in config.get("architectures") or []):
        return False
    if any(module.method is not None for module in adapter.modules):
        return False
    settings = adapter.settings
    special = settings.initialization or settings.layer_replication or settings.target_parameters or adapter.whole
    if special or config.get("model_type") in _TRANSPOSING or adapter.config.get("fan_in_fan_out"):
        return False
    return all(len(m.lora_A.shape) == 2 and not m.embedding and m.bias is None for m in adapter.modules)


def _place_plain(adapters: Sequence[Adapter], checkpoint: Checkpoint, config: Mapping[str, Any]) -> Placed | None:
    """The quick way, or None where only the model's class can tell."""
    if not all(_is_plain(adapter, config) for adapter in adapters):
        return None
    try:
        placed = tuple((adapter, _place_linears(adapter, checkpoint)) for adapter in adapters)
    except PlacementError:
        return None  # the names may be those of another transformers version, which the class knows
    vocabularies = vocabulary_sizes(config)
    if any(item.weight.shape[0] in vocabularies for _, modules in placed for item in modules):
        return None  # an output embedding may be tied to the input's
    return plain_target(checkpoint), placed


def _place_linears(adapter: Adapter, checkpoint: Checkpoint) -> tuple[PlacedModule, ...]:
    shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    names, renaming = place({module.path: module.weight_shape for module in adapter.modules}, shapes)
    require_all_targets(adapter.config, names, [renaming.to_adapter(n) for n in linear_paths(shapes)])
    placed = []
    for module in adapter.modules:
        ref = checkpoint.tensors[names[module.path]]
        weight = WeightView((ref.shape[0], ref.shape[1]), (Piece(ref, 0, ref.shape[0]),))
        placed.append(PlacedModule(module, weight, ref.name, module.rank, module.scaling))
    return tuple(placed)


def _with_scalars(
    adapter: Adapter, modules: tuple[PlacedModule, ...], checkpoint: Checkpoint
) -> tuple[PlacedModule, ...]:
    if adapter.authors_scalars:
        return with_gains(adapter, modules, checkpoint)
    if adapter.method != "MAP":
        return modules
    scalars = {(item.path, item.expert): item for item in adapter.map_modules}
    missing = [item.key for item in modules if item.key not in scalars]
    if missing or len(scalars) != len(modules):
        raise AdapterError(
            f"{adapter.path}: map_config.json describes {counted(len(scalars), 'weight')}, but the tensors make "
            f"{len(modules)}: the files do not belong together."
        )
    return tuple(item.with_scalars(scalars[item.key]) for item in modules)


def _refuse_other_dtypes(placed: Sequence[tuple[Adapter, Sequence[PlacedModule]]]) -> None:
    """An 8-bit tensor without scales is the code of a weight, not the weight."""
    for ref in (piece.tensor for _, modules in placed for item in modules for piece in item.weight.pieces):
        if ref.dtype not in FLOAT_DTYPES.values():
            raise CheckpointError(
                f"{ref.file}: {ref.name} has dtype {ref.dtype}: adapters can only be used with plain weights, so give "
                "the 16-bit or 32-bit model with --base."
            )


def _refuse_shared(placed: Sequence[tuple[Adapter, Sequence[PlacedModule]]]) -> None:
    """A DoRA rescales the whole weight, so that its merge does not add to another adapter's."""
    owners: dict[tuple, tuple[Adapter, PlacedModule]] = {}
    for adapter, modules in placed:
        for item in modules:
            key = (item.parameter, item.expert)
            other, own = owners.setdefault(key, (adapter, item))
            if other is not adapter and (_rescales(adapter, item) or _rescales(other, own)):
                changing = adapter if _rescales(adapter, item) else other
                raise UnsupportedError(
                    f"{adapter.path} and {other.path} both adapt {item.module.path}, and {changing.path} "
                    f"({changing.method}) changes the weight as a whole: merging one after the other is not what "
                    "running both computes. Merge one of them alone, or convert both with `mapconv upgrade "
                    "--lora-compatible` first."
                )


def _rescales(adapter: Adapter, item: PlacedModule) -> bool:
    if adapter.authors_scalars:
        return True
    if adapter.method != "MAP":
        return item.module.magnitude is not None or item.module.method is not None
    scalars = next(s for s in adapter.map_modules if (s.path, s.expert) == item.key)
    return scalars.direction == "dora" or scalars.base_gain != 1.0
