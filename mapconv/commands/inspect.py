"""Say what an adapter is, from its configuration and headers alone, and what ``upgrade`` would make of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter, Addition, Module, WholeTensor
from mapconv.checkpoint.codecs import storages
from mapconv.checkpoint.codecs.base import EncodedTensor
from mapconv.formats.image.products import Update
from mapconv.hub.locate import locate_adapter
from mapconv.options.commands import INSPECT
from mapconv.placement.adapters import place_adapter, read_as
from mapconv.spelling import Axis, Norm, Rescaling
from mapconv.wording import counted


@dataclass(frozen=True)
class TargetGroup:
    """The adapted modules of one type, such as ``q_proj``."""

    module_type: str
    count: int
    layers: str
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    shapes: tuple[tuple[int, int], ...]
    parameters: int


@dataclass(frozen=True)
class Inspection:
    """What an adapter is.

    ``origin`` is what a MAP directory was made from, by its own record. ``peft_version`` is what the configuration
    says, and ``written_by`` the program, where the files tell. ``dialect`` is the writer's name for the form
    of the files, and ``components`` the models of a pipeline that are adapted, where it tells several apart. ``fits``
    is the base that it was placed on, or None if no base was given; ``storages`` counts that base's quantized weights
    by how they are stored.
    """

    source: Path
    method: str
    dialect: str
    components: tuple[str, ...]
    base: str | None
    revision: str | None
    origin: str | None
    peft_version: str | None
    written_by: str | None
    task_type: str | None
    modules: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]
    targets: tuple[TargetGroup, ...]
    whole_tensors: tuple[str, ...]
    dora: str | None
    upgrade: str
    fits: Path | None
    storages: dict[str, int]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"source": str(self.source), "fits": None if self.fits is None else str(self.fits)}


@INSPECT.checks
def inspect(
    source: str | Path,
    *,
    base: str | Path | None = None,
    dora_axis: Axis | None = None,
    dora_norm: Norm = "merged",
    allow_pickle: bool = False,
) -> Inspection:
    """Describe an adapter, and with ``base`` check that it fits there; no tensor's values are read.

    Raises:
        MapconvError: the adapter is broken or refused, or does not fit the base.
    """
    source = locate_adapter(source, allow_pickle=allow_pickle)
    fits, found, notes = None, {}, []
    dora = Rescaling(dora_axis, dora_norm)
    if base is None:
        adapter = read_as(source, dora, allow_pickle=allow_pickle)
        modules = adapter.modules
    else:
        placed = place_adapter(source, base, allow_pickle=allow_pickle, fetch="ranges", dora=dora)
        adapter, fits = placed.adapter, placed.target.folder
        # The base's own names say more than underscores do, and its shapes more than another method's tensors.
        told = adapter.is_spelled or any(module.method is not None for module in adapter.modules)
        modules = [item.module for item in placed.modules] if told else adapter.modules
        found = dict(storages(placed.target.checkpoint))
        notes = _base_notes(adapter, str(base), found)
    groups: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        groups[module.module_type].append(module)
    return Inspection(
        source=source,
        method=_method(adapter),
        dialect=adapter.dialect,
        components=_components(adapter),
        base=adapter.base,
        revision=adapter.revision,
        origin=_origin(adapter),
        peft_version=adapter.config.get("peft_version"),
        written_by=_writer(adapter),
        task_type=adapter.config.get("task_type"),
        modules=len(adapter.modules),
        parameters=adapter.parameters,
        nbytes=adapter.nbytes,
        dtypes=tuple(sorted({ref.dtype for ref in adapter.tensors})),
        targets=tuple(_group(name, modules) for name, modules in groups.items()),
        whole_tensors=(*map(_describe, adapter.whole), *(_addition(item) for item in adapter.additions)),
        dora=_dora(adapter),
        upgrade=_forecast(adapter, modules),
        fits=fits,
        storages=found,
        notes=(*adapter.notes, *notes),
    )


def _method(adapter: Adapter) -> str:
    """The adapter's method; of an image adapter's updates that are no product of two factors, what they are."""
    kinds = dict.fromkeys(_kind(module) for module in adapter.modules)
    if not adapter.is_spelled or kinds.keys() <= {"LoRA"}:
        return adapter.method
    return f"{' + '.join(kinds)}{' with magnitudes' if adapter.method == 'DoRA' else ''}"


def _kind(module: Module) -> str:
    if module.delta is None:
        return "LoRA"
    encoding = module.delta.encoding if isinstance(module.delta, EncodedTensor) else None
    return encoding.label if isinstance(encoding, Update) else "full difference"


def _writer(adapter: Adapter) -> str | None:
    """Which program wrote the files; a MAP adapter's configuration has the PEFT version of what it was made from."""
    if adapter.method.startswith("MAP"):
        return f"mapconv {(adapter.map_config or {}).get('mapconv_version') or ''}".rstrip()
    version = adapter.config.get("peft_version")
    return f"PEFT {version}" if version else None


def _origin(adapter: Adapter) -> str | None:
    """What a MAP directory was made from, and for a rebased one where that was trained."""
    record = adapter.map_config or {}
    sources = (record.get("source"), *(record.get("more_sources") or ()))
    made = " + ".join(f"{one['name']} ({one.get('method')})" for one in sources if one and one.get("name"))
    trained_on = ((record.get("rebase") or {}).get("from") or {}).get("name")
    return f"{made}, trained on {trained_on} and rebased" if made and trained_on else made or None


def _components(adapter: Adapter) -> tuple[str, ...]:
    spellings = [module.spelling for module in adapter.modules if module.spelling is not None]
    return tuple(dict.fromkeys(" or ".join(spelling.components) for spelling in spellings))


def _base_notes(adapter: Adapter, given: str, found: dict[str, int]) -> list[str]:
    """That a quantized base was given which is not the one that the configuration names."""
    if not found or not adapter.base or adapter.base == given:
        return []
    return [
        f"the configuration names {adapter.base}, and the quantized {given} was given: if the adapter was trained on "
        "other values than those that its codes stand for, results differ by the error of quantizing them"
    ]


def _group(name: str, modules: list[Module]) -> TargetGroup:
    return TargetGroup(
        module_type=name,
        count=len(modules),
        layers=_ranges(sorted({module.layer for module in modules if module.layer is not None})),
        ranks=tuple(sorted({module.rank for module in modules if module.rank})),
        scalings=tuple(sorted({module.scaling for module in modules if module.method is None})),
        # A method's own tensors do not say what weight they are for, until they are placed.
        shapes=tuple(sorted({module.weight_shape for module in modules if module.weight_shape != (0, 0)})),
        parameters=sum(ref.numel for module in modules for ref in module.tensors),
    )


def _describe(item: WholeTensor) -> str:
    shape = "×".join(map(str, item.tensor.shape))
    return f"{item.parameter} ({shape}{'' if item.rows is None else ' rows'})"


def _addition(item: Addition) -> str:
    return f"{item.tensor.name} ({'replaces' if item.replaces else 'adds to'} a {item.leaf})"


def _dora(adapter: Adapter) -> str | None:
    """What a DoRA's magnitudes mean, and why."""
    found = {module.rescaling for module in adapter.modules if module.magnitude is not None}
    if adapter.method != "DoRA" or not found:
        return None
    axes = {"out": "outputs", "in": "inputs", None: "outputs or inputs (square weights do not tell: --dora-axis)"}
    of = " and ".join(sorted(axes[item.axis] for item in found))
    if any(item.norm == "base" for item in found):
        return f"magnitudes of {of}, divided by the base weight's norm (--dora-norm base)"
    return f"magnitudes of {of}, divided by the merged weight's norm, as it was trained"


def _forecast(adapter: Adapter, modules: Sequence[Module]) -> str:
    """What an upgrade would do; ``modules`` are the adapter's, placed where that tells more."""
    if not modules:
        return "nothing: it replaces whole tensors, and can be merged"
    dense = sum(module.is_dense for module in modules)
    if dense:
        return f"the closest MAP weight at --rank or --tolerance: {counted(dense, 'update')} of full rank"
    by_method = any(module.method is not None for module in modules)
    if by_method or (adapter.method == "LoRA" and any(module.delta is not None for module in modules)):
        return "exact: α and β follow from norms, and factors from the update, which is of low rank"
    if adapter.method == "LoRA":
        return "exact: α and β follow from norms, the factors are kept"
    if adapter.method == "LoMAP":
        return "exact: α, β and the factors are kept, in the form that stock PEFT loads"
    if adapter.method == "DoRA":
        return (
            "the closest MAP weight at the same rank (ε is reported); --direction dora keeps DoRA's own factors, exact"
        )
    return "nothing: this is a MAP adapter already"


def _ranges(numbers: list[int]) -> str:
    """``0-3, 5`` for [0, 1, 2, 3, 5]."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
