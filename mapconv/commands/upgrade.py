"""Convert a LoRA or DoRA adapter into a MAP directory: plan, convert module by module, write whole or not at all."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mapconv.adapter import Direction, MapModule
from mapconv.card import CARD_FILE, local_card
from mapconv.checkpoint.reader import SAFETENSORS_DTYPES, TensorReader
from mapconv.checkpoint.staging import check_output, staged_folder, write_file
from mapconv.checkpoint.writer import SpooledFile, TensorSpec
from mapconv.convert import DEFAULT_MAX_RANK, Converted, Converter, ConvertOptions
from mapconv.errors import UnsupportedError
from mapconv.formats.mapdir import needs_magnitude, peft_config, peft_factors, peft_magnitude, write_configs
from mapconv.formats.peft import KEY_PREFIX, WEIGHTS_FILE
from mapconv.hub import hub_reference, locate_adapter
from mapconv.hub.ranges import prefetch
from mapconv.norms import BaseNorms
from mapconv.parallel import in_order, worker_count
from mapconv.placing import PlacedAdapter, place_adapter
from mapconv.progress import progress_bar
from mapconv.provenance import base_name, base_revision, map_config
from mapconv.sidecars import copy_tokenizer


@dataclass(frozen=True)
class UpgradeResult:
    """What an upgrade wrote, or with ``dry_run`` what it would write (then without modules)."""

    out: Path
    source: Path
    base: Path
    method: str
    modules: tuple[MapModule, ...]
    planned: int
    parameters: int
    nbytes: int
    seconds: float
    dry_run: bool
    plain_lora: bool
    notes: tuple[str, ...] = ()

    @property
    def worst_error(self) -> float:
        return max((module.error for module in self.modules), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        table = asdict(self) | {name: str(getattr(self, name)) for name in ("out", "source", "base")}
        table["modules"] = [module.to_dict() for module in self.modules]
        return table | {"worst_error": self.worst_error}


def upgrade(
    source: str | Path,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    max_rank: int = DEFAULT_MAX_RANK,
    direction: Direction = "low-rank",
    lora_compatible: bool = False,
    dtype: str = "float32",
    device: str = "auto",
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
) -> UpgradeResult:
    """Convert a LoRA or DoRA adapter to MAP form.

    Args:
        source: the adapter's folder, or a Hub reference (``owner/name[@revision][:subfolder]``).
        out: the MAP directory to write; None: ``<source>-map`` beside the source, or here for one from the Hub.
        base: the base model's folder or Hub id; None takes it from the adapter's configuration.
        rank: rank of the result; None keeps each module's own.
        tolerance: instead of ``rank``: the smallest rank of each module whose ε is at most this, up to ``max_rank``.
        direction: ``low-rank``: Δ = BA, refitted if the source is DoRA. ``dora``: DoRA's own update, exact.
        lora_compatible: hold a = 1, so that the result is a plain LoRA adapter as well.
        dtype: of the stored factors: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the source's own.
        device: ``auto``, ``cpu`` or ``cuda``: where refits run.
        allow_pickle: read weights from a ``.bin`` file (with torch's weights-only loader).
        force: replace ``out``.
        dry_run: plan and check, write nothing.
        quiet: no progress bar.

    Raises:
        MapconvError: of the kind that fits; ``out`` then does not exist.
        ValueError: options that exclude each other.
    """
    started = time.perf_counter()
    if rank is not None and tolerance is not None:
        raise ValueError("rank and tolerance exclude each other")
    if lora_compatible and direction == "dora":
        raise ValueError("a DoRA direction is no plain LoRA: lora_compatible needs the low-rank direction")
    out = default_output(source) if out is None else Path(out)
    source = locate_adapter(source, allow_pickle=allow_pickle)
    options = ConvertOptions(rank, tolerance, max_rank, direction, lora_compatible, dtype, device)
    placed = place_adapter(source, base, allow_pickle=allow_pickle, lean=True)
    if placed.adapter.method == "MAP":
        raise UnsupportedError(f"{source} is a MAP adapter already: upgrade the adapter that it was made from.")
    nbytes = sum(options.stored_bytes(item) for item in placed.modules)
    check_output(out, force=force, inputs=[source, placed.target.folder], nbytes=nbytes)
    norms = BaseNorms(placed.target.checkpoint)
    modules: tuple[MapModule, ...] = ()
    parameters = 0
    if not dry_run:
        with staged_folder(out, force=force) as staging:
            modules, parameters = _write(placed, options, norms, staging, quiet=quiet)
            nbytes = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    return UpgradeResult(
        out=out,
        source=source,
        base=placed.target.folder,
        method=placed.adapter.method,
        modules=modules,
        planned=len(placed.modules),
        parameters=parameters,
        nbytes=nbytes,
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        plain_lora=not needs_magnitude(modules),
        notes=(*_notes(placed, options), *norms.notes),
    )


def default_output(source: str | Path) -> Path:
    """``<source>-map`` beside the source; for one from the Hub, its name alone, in the current folder."""
    reference = hub_reference(source)
    if reference is not None:
        return Path(f"{reference.name}-map")
    source = Path(source)
    resolved = source.resolve()
    return resolved.parent / f"{resolved.name}-map" if source.name in ("", "..") else Path(f"{source}-map")


def _write(
    placed: PlacedAdapter, options: ConvertOptions, norms: BaseNorms, staging: Path, *, quiet: bool
) -> tuple[tuple[MapModule, ...], int]:
    """Convert every module into ``staging``; returns their scalars and the number of parameters."""
    spool = SpooledFile(staging / WEIGHTS_FILE, _expected(placed, options))
    try:
        converted, parameters = _convert(placed, options, norms, spool, quiet=quiet)
        modules = tuple(result.scalars for result in converted)
        if needs_magnitude(modules):
            for item, result in zip(placed.modules, converted, strict=True):
                spool.append(*peft_magnitude(item.module, result.magnitude))
        _keep_the_rest(placed, spool)
        spool.finish()
    finally:
        spool.close()
    copy_tokenizer(placed.adapter.path, staging)
    base = base_name(placed)
    names = {item.module.path: item.parameter if item.experts > 1 else item.module.path for item in placed.modules}
    own_paths = {module.path for module in placed.adapter.modules}
    respelled = any(item.module.path not in own_paths for item in placed.modules)
    config = peft_config(placed.adapter.config, modules, names, base=base, respelled=respelled)
    config["revision"] = base_revision(placed)
    record = map_config(placed, options, modules)
    write_file(staging / CARD_FILE, local_card(config, record))
    write_configs(staging, config, record)
    return modules, parameters


def _convert(
    placed: PlacedAdapter, options: ConvertOptions, norms: BaseNorms, spool: SpooledFile, *, quiet: bool
) -> tuple[list[Converted], int]:
    """Spool the factors of every module; returns what is left of each, and the number of MAP's parameters."""
    workers = worker_count(max(options.working_bytes(item) for item in placed.modules))
    total = sum(item.weight.nbytes for item in placed.modules)
    converted, stack, parameters = [], [], 0
    source = placed.target.checkpoint.source
    light = [item.weight for item in placed.modules if options.keeps_lora(item)]
    needed = [item.weight for item in placed.modules if not options.keeps_lora(item) or item.initialization]
    prefetch(source, [piece.tensor for w in (*needed, *norms.missing(light)) for piece in w.pieces], quiet=quiet)
    with TensorReader(source) as reader, progress_bar(total, "upgrading", quiet=quiet) as advance:
        norms.load(light, reader)
        results = in_order(Converter(reader, options, norms).convert, placed.modules, workers)
        for item, result in zip(placed.modules, results, strict=True):
            stack.append(result)
            if len(stack) == item.experts:
                # Experts follow one another: A has them in turn, B side by side, with the expert counting fastest.
                A = torch.cat([expert.A for expert in stack])
                B = torch.stack([expert.B for expert in stack], dim=2).flatten(1)
                for name, tensor in peft_factors(item.module, A, B):
                    spool.append(name, tensor)
                stack.clear()
            parameters += result.A.numel() + result.B.numel() + 2  # α and β
            converted.append(result.without_factors())
            advance(item.weight.nbytes)
    return converted, parameters


def _expected(placed: PlacedAdapter, options: ConvertOptions) -> list[TensorSpec]:
    """The tensors of the result in their order, where that is known before any is computed: a LoRA of linear layers."""
    simple = all(options.keeps_lora(m) and m.experts == 1 and m.module.bias is None for m in placed.modules)
    if not simple or placed.adapter.others:
        return []
    specs = []
    for item in placed.modules:
        dtype, (height, width) = options.stored_dtype(item), item.weight.shape
        A, B = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((item.effective_rank, width), (height, item.effective_rank))
        )
        specs += [
            TensorSpec(name, SAFETENSORS_DTYPES[dtype], tuple(t.shape)) for name, t in peft_factors(item.module, A, B)
        ]
    return specs


def _keep_the_rest(placed: PlacedAdapter, spool: SpooledFile) -> None:
    """Carry over what is no low-rank update: heads, rows and biases as they are, LoRA biases with their scaling."""
    with TensorReader() as reader:
        for item in {item.module.path: item for item in placed.modules}.values():
            if item.module.bias is not None:
                bias = reader.read(item.module.bias).float() * item.scaling
                spool.append(f"{KEY_PREFIX}{item.module.path}.lora_B.bias", bias)
        for name, ref in placed.adapter.others.items():
            spool.append(name, reader.read(ref))


def _notes(placed: PlacedAdapter, options: ConvertOptions) -> list[str]:
    adapter = placed.adapter
    notes = list(adapter.notes)
    if adapter.whole:
        notes.append(f"{len(adapter.whole)} whole tensors (heads, biases or token rows) are kept as they are")
    if adapter.method == "LoRA" and options.direction == "dora":
        notes.append("the source is a LoRA adapter, which is exact in low-rank form: --direction dora changes nothing")
    highest = max(item.effective_rank for item in placed.modules)
    if adapter.method == "LoRA" and options.rank is not None and options.rank > highest:
        notes.append(f"the source is a LoRA adapter of rank {highest}: a higher rank would add nothing, so it is kept")
    return notes
