"""Write an adapter for another program, whole or not at all; or only say whether a server loads it as it is."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mapconv.adapter import Adapter
from mapconv.checkpoint.filenames import ADAPTER_FILES
from mapconv.checkpoint.unchanged import signatures_of, unchanged
from mapconv.commands.folding import Folding
from mapconv.errors import UnsupportedError
from mapconv.exporting.choices import cannot_hold, format_for, layout_for, require_model, server_notes
from mapconv.exporting.experts import relaid
from mapconv.exporting.formats import FORMATS
from mapconv.exporting.limits import Limits
from mapconv.exporting.output import check_place, discarded, staged, write
from mapconv.exporting.servers import BY_NAME, Server, faults
from mapconv.formats import read_adapter
from mapconv.formats.base import Found
from mapconv.formats.peft import PeftDirectory
from mapconv.hub.locate import Fetch, locate_adapter, open_base
from mapconv.metadata.provenance import base_name
from mapconv.options.exporting import EXPORT
from mapconv.options.shared import MAX_RANK
from mapconv.placement.adapters import PlacedAdapter, place_adapter, place_described
from mapconv.placement.bases import plain_base
from mapconv.refit.plan import ConvertOptions, Dtype, plan_upgrade
from mapconv.spelling import Axis, Norm, Rescaling

FormatName = Literal["peft", "diffusers", "kohya", "comfyui", "mlx", "gguf"]
ServerName = Literal["vllm", "sglang", "tensorrt-llm", "llama.cpp", "ollama", "comfyui", "lorax"]


@dataclass(frozen=True)
class ExportedModule:
    """One module of the result: ε is 0 where its factors are the source's own."""

    path: str
    expert: int | None
    rank: int
    error: float

    def to_dict(self) -> dict[str, Any]:
        return vars(self).copy()


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export wrote; with ``check`` nothing, and ``faults`` say why the server would not load the source.

    With ``check``, ``suffix`` is that of the file that an export for the server would write; None: it is a folder.
    ``rank`` is that of every module, or None where they differ. ``folded`` names what went into the base that
    ``fold_into`` holds. A dry run measured all of this on files that are gone, and ``refused`` names what an export
    would stop at.
    """

    out: Path | None
    source: Path
    base: Path | None
    method: str
    format: str
    server: str | None
    modules: tuple[ExportedModule, ...]
    rank: int | None
    nbytes: int
    seconds: float
    faults: tuple[str, ...] = ()
    suffix: str | None = None
    dry_run: bool = False
    refused: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    fold_into: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def worst_error(self) -> float:
        return max((module.error for module in self.modules), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        table = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}
        table["modules"] = [module.to_dict() for module in self.modules]
        return table | {"worst_error": self.worst_error}


@EXPORT.checks
def export(
    source: str | Path,
    out: str | Path | None = None,
    *,
    to: FormatName | None = None,
    server: ServerName | None = None,
    base: str | Path | None = None,
    check: bool = False,
    fold_into: str | Path | None = None,
    experts: Literal["split", "fused", "tinker", "sglang"] | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    max_rank: int | None = None,
    dtype: Dtype = "float32",
    device: str = "auto",
    dora_axis: Axis | None = None,
    dora_norm: Norm = "merged",
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
) -> ExportResult:
    """Write an adapter in the format, and within the limits, of another program.

    Args:
        source: the adapter's folder or file, in any dialect, or a Hub reference.
        out: the folder or the file to write; it appears whole or not at all. None only with ``check``.
        to: the format; None: the one that ``server`` reads.
        server: keep to what this server loads; what it cannot hold is refitted, with ε measured, or refused by name.
        base: the base model's folder or Hub id; None takes it from the adapter's configuration.
        check: only say whether the server would load the source as it is; nothing is written.
        fold_into: merge what the format cannot hold into the base, and write that model here.
        experts: layout of experts in a PEFT folder: ``split`` is one LoRA for each projection of each expert, ``fused``
            PEFT's ``target_parameters``, ``tinker`` and ``sglang`` stacks of three dimensions; None: the source's, or
            what the server reads.
        rank: rank of the result; None keeps each module's own.
        tolerance: instead of ``rank``: the smallest rank of each module whose ε is at most this, up to
            ``max_rank`` (256).
        dtype: of the stored factors: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the source's own.
        device: ``auto``, ``cpu`` or ``cuda``: where refits run.
        dora_axis: of a DoRA whose file does not say so: whether its magnitudes are those of outputs or of inputs.
        dora_norm: what they are divided by: the norm of the ``merged`` weight, or of the ``base``'s.
        allow_pickle: read weights from a ``.bin`` file (with torch's weights-only loader).
        force: replace ``out`` and ``fold_into``.
        dry_run: convert and measure all, keep nothing; what the format does not take is named and no error.
        quiet: no progress bar.

    Raises:
        MapconvError: of the kind that fits; ``out`` then does not exist.
        ValueError: an option out of its range, or options that cannot be used together.
    """
    started = time.perf_counter()
    source = locate_adapter(source, allow_pickle=allow_pickle)
    row = None if server is None else BY_NAME[server]
    if check:
        assert row is not None  # the options' rules see to it
        return _checked(source, row, allow_pickle=allow_pickle, started=started)
    assert out is not None
    out, limits = Path(out), Limits(FORMATS[format_for(to, row)], row)
    signatures = signatures_of([source], ADAPTER_FILES)
    method, placed = _place(
        source,
        base,
        Rescaling(dora_axis, dora_norm),
        allow_pickle=allow_pickle,
        fetch="ranges" if fold_into is None else "files",
    )
    require_model(placed, row)
    layout = layout_for(experts, limits.format.name, row, placed)
    limits, laid = replace(limits, experts=layout), relaid(placed, layout)
    placed = laid.placed
    left_over = limits.left_over(placed)
    folding = None if fold_into is None or not left_over else Folding(placed, limits, Path(fold_into))
    kept = limits.without(placed)
    if not placed.modules:
        raise UnsupportedError(
            f"{source} ({method}) replaces whole tensors alone, and nothing exports those: merge it."
        )
    if not kept.modules:
        raise UnsupportedError(
            f"{limits.format.title} has no names for the modules of {placed.target.folder}, or does not take their "
            f"kind ({left_over[0]} and the like): choose another --to, or merge the adapter with `mapconv merge`."
        )
    refused = left_over if folding is None else []
    if refused and not dry_run:
        raise UnsupportedError(cannot_hold(source, limits, left_over))
    plan = plan_upgrade(kept, _options(kept, limits, rank, tolerance, max_rank, dtype, device))
    check_place(out, limits, [source, placed.target.folder], nbytes=2 * plan.nbytes, force=force)
    base_now, notes = base_name(placed), [*placed.adapter.notes]
    if folding is not None:
        folding.check(out, force=force)
        base_now = str(Path(fold_into or "").resolve())
    elif fold_into is not None:
        notes.append(f"{limits.reader} holds all of the adapter: nothing is left to fold, and no base is written")
    signatures |= placed.target.checkpoint.signatures
    with ExitStack() as stack:
        place = discarded(out, limits) if dry_run else staged(out, limits, force=force)
        folder = None
        if folding is None or dry_run:
            target = stack.enter_context(place)
        else:
            folder, target = stack.enter_context(folding.staged(place, out, force=force))
        stack.enter_context(unchanged(signatures))
        modules, one_rank = write(plan, limits, base_now, target, leaves=laid.leaves, quiet=quiet)
        nbytes = sum(path.stat().st_size for path in ([target] if target.is_file() else target.iterdir()))
        if folding is not None:
            notes += folding.write(folder, quiet=quiet)
    return ExportResult(
        out=out,
        source=source,
        base=placed.target.folder,
        method=method,
        format=limits.format.name,
        server=server,
        modules=tuple(
            ExportedModule(module.path, module.placed.expert, module.rank, module.scalars.measured_error)
            for module in modules
        ),
        rank=one_rank,
        nbytes=nbytes,
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        refused=tuple(refused),
        folded=() if folding is None else tuple(left_over),
        fold_into=None if folding is None else Path(fold_into or ""),
        notes=(*notes, *server_notes(row, max(module.rank for module in modules))),
    )


def _checked(source: Path, server: Server, *, allow_pickle: bool, started: float) -> ExportResult:
    """Whether the server would load the adapter as it is."""
    adapter = read_adapter(source, allow_pickle=allow_pickle)
    found = faults(adapter if adapter.method != "MAP" else _as_peft(source, allow_pickle=allow_pickle), server)
    ranks = {module.rank for module in adapter.modules}
    return ExportResult(
        out=None,
        source=source,
        base=None,
        method=adapter.method,
        format=adapter.dialect,
        server=server.name,
        modules=tuple(ExportedModule(module.path, None, module.rank, 0.0) for module in adapter.modules),
        rank=max(ranks) if len(ranks) == 1 else None,
        nbytes=adapter.nbytes,
        seconds=time.perf_counter() - started,
        faults=tuple(found),
        suffix=FORMATS[server.formats[0]].suffix,
        notes=tuple(server_notes(server, max(ranks, default=0))),
    )


def _as_peft(source: Path, *, allow_pickle: bool) -> Adapter:
    """A MAP directory as the PEFT folder that it is as well: a LoRA, or a DoRA of the same function."""
    return PeftDirectory().read(Found(source), allow_pickle=allow_pickle)


def _place(
    source: Path, base: str | Path | None, dora: Rescaling, *, allow_pickle: bool, fetch: Fetch
) -> tuple[str, PlacedAdapter]:
    """(method, the adapter on its base); a MAP adapter as the LoRA or DoRA that stock PEFT takes it for."""
    adapter = read_adapter(source, allow_pickle=allow_pickle)
    if adapter.method != "MAP":
        return adapter.method, place_adapter(source, base, allow_pickle=allow_pickle, fetch=fetch, dora=dora)
    adapter = _as_peft(source, allow_pickle=allow_pickle)
    checkpoint, config = plain_base(open_base(base, adapter.base, adapter.revision, source, fetch=fetch))
    return "MAP", place_described(adapter, checkpoint, config)


def _options(
    kept: PlacedAdapter,
    limits: Limits,
    rank: int | None,
    tolerance: float | None,
    max_rank: int | None,
    dtype: Dtype,
    device: str,
) -> ConvertOptions:
    """DoRA's own factors where they may be kept; else the closest update, a plain LoRA's where it must be one."""
    doras = [item.module for item in kept.modules if item.module.magnitude is not None]
    own = all(module.rescaling.is_peft and module.delta is None for module in doras)
    return ConvertOptions(
        rank,
        tolerance,
        max_rank or MAX_RANK.fallback,
        "dora" if limits.dora and own and rank is None and tolerance is None else "low-rank",
        not (limits.dora and doras),
        dtype,
        device,
    )
