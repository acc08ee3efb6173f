"""Merge adapters into their base: one pass over the checkpoint, written whole or not at all."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from mapconv.adapter import ITEM_SIZES
from mapconv.algebra.fingerprint import Fingerprint
from mapconv.checkpoint.codecs import storages
from mapconv.checkpoint.filenames import ADAPTER_FILES, MERGE_RECORD
from mapconv.checkpoint.index import Checkpoint
from mapconv.checkpoint.staging import check_output, check_output_file, staged_file, staged_folder, write_file
from mapconv.checkpoint.unchanged import signatures_of, unchanged
from mapconv.commands.base_values import MEASURED_SAMPLES, BaseValues, choose_base
from mapconv.commands.feedback import feedback_run
from mapconv.errors import BaseMismatchError
from mapconv.hub.locate import locate_adapter
from mapconv.hub.reference import shown
from mapconv.merging.companions import write_companions
from mapconv.merging.merger import MergedTensor, survival_record
from mapconv.merging.plan import plan_merge
from mapconv.merging.survival import DAMAGED, Survival, total
from mapconv.merging.writer import write_weights
from mapconv.metadata.provenance import merge_record
from mapconv.options.merging import MERGE, SCALES
from mapconv.options.shared import SAMPLES, SEQUENCE_LENGTH
from mapconv.placement.adapters import PlacedAdapter, place_adapters
from mapconv.placement.base_check import base_fault
from mapconv.placement.kept_codes import keep_codes
from mapconv.placement.selection import module_rule
from mapconv.refit.plan import Dtype
from mapconv.spelling import Axis, Norm, Rescaling
from mapconv.wording import counted

log = logging.getLogger(__name__)
#: What becomes of weights that the base stores in codes.
Quantized = Literal["dequantize", "copy", "keep"]
Scales = Literal["keep", "recompute"]
Rounding = Literal["nearest", "feedback"]


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote, or with ``dry_run`` what it would write."""

    out: Path
    base: Path
    method: str
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    merged: tuple[MergedTensor, ...]
    seconds: float
    dry_run: bool
    notes: tuple[str, ...] = ()

    @property
    def survival(self) -> Survival:
        """What of the update survives in all changed tensors together."""
        return total(item.survival for item in self.merged)

    def to_dict(self) -> dict[str, Any]:
        table = asdict(self) | {"out": str(self.out), "base": str(self.base)}
        table["merged"] = [item.to_dict() for item in self.merged]
        table["survival"] = self.survival.to_dict()
        return table


@MERGE.checks
def merge(
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    dtype: Dtype = "auto",
    max_shard_size: int | str | None = None,
    rounding: Rounding = "nearest",
    quantized: Quantized = "dequantize",
    scales: Scales | None = None,
    lift: str | Sequence[str] | None = None,
    min_survival: float | None = None,
    base_values: BaseValues | None = None,
    original: str | Path | None = None,
    data: str | Path | None = None,
    samples: int | None = None,
    dora_axis: Axis | None = None,
    dora_norm: Norm = "merged",
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
) -> MergeResult:
    """Merge a MAP directory or a LoRA or DoRA adapter, or several, into the base model and write it to ``out``.

    Args:
        adapters: the adapter's folder or Hub reference (``owner/name[@revision][:subfolder]``), or several: updates of
            LoRA and MAP adapters on one weight add up.
        out: the folder to write; it appears whole or not at all.
        base: the base model's folder or Hub id; None takes it from the first adapter's configuration.
        weights: a factor for each adapter's update; None: 1 for each.
        dtype: ``auto`` (each tensor keeps its own), ``float32``, ``bfloat16`` or ``float16``.
        max_shard_size: bytes of tensors in one file, or a text such as ``5GB``; None keeps the base's files.
        rounding: ``nearest``: each value to the nearest of its dtype. ``feedback``: to 16 bits with the layers' inputs
            on ``data`` in view, so that the outputs change less; every value stays within a step of its unrounded one.
        quantized: what to do with weights that the base stores in codes: ``dequantize`` all, so that the result is an
            ordinary model in 16 bits; ``copy`` them as they are, where the adapters change plain ones alone; ``keep``:
            copy those that no adapter changes, and write the merged ones in the same storage.
        scales: of merged weights that stay in codes: ``keep`` those of the base, or ``recompute`` them (the default).
        lift: of those, modules to write in 16 bits instead: ends of their names, or a regular expression.
        min_survival: lift all modules of which a first pass finds less than this share of the update to survive.
        base_values: where the base is quantized, what to merge into: its ``stored`` values, the ``original`` model that
            it was made from, or the one under which ``data`` is likelier (``measured``); None: the base as it is given.
        original: that model's folder or Hub id; None: what the base's card names.
        data: text for ``rounding``, or to measure ``base_values`` on.
        samples: sequences of 256 tokens of it (8; 32 for ``rounding``).
        dora_axis: of a DoRA whose file does not say so: whether its magnitudes are those of outputs or of inputs.
        dora_norm: what they are divided by: the norm of the ``merged`` weight, or of the ``base``'s.
        allow_pickle: read weights from ``.bin`` files (with torch's weights-only loader).
        force: replace ``out``, and accept a base whose weights are not those a MAP adapter was made for.
        dry_run: do all of it but write, so that what would stop the merge stops this.
        quiet: no progress bar.

    Raises:
        MapconvError: of the kind that fits; ``out`` then does not exist.
        ValueError: an option out of its range, another number of weights than of adapters,
            or a dtype for weights that are copied in codes.
    """
    started = time.perf_counter()
    assert not isinstance(max_shard_size, str)  # the option has made bytes of it
    named = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    sources = [locate_adapter(adapter, allow_pickle=allow_pickle) for adapter in named]
    signatures = signatures_of(sources, ADAPTER_FILES)
    out = Path(out)
    choice = None
    if base_values is not None:
        measured = {"original": original, "data": data, "samples": samples or MEASURED_SAMPLES}
        choice = choose_base(sources[0], base, base_values, **measured, allow_pickle=allow_pickle, quiet=quiet)
        base = choice.base
    placed = place_adapters(sources, base, allow_pickle=allow_pickle, dora=Rescaling(dora_axis, dora_norm))
    in_codes = quantized != "dequantize"
    shapes = {"weights": weights, "dtype": dtype, "max_shard_size": max_shard_size}
    as_placed = placed
    if in_codes:
        rule = None if lift is None else module_rule(lift, "--lift")
        placed = keep_codes(as_placed, rewrite=quantized == "keep", lift=rule)
    plan = plan_merge(placed, **shapes)
    folder = plan.target.folder
    single = plan.target.checkpoint.is_file
    if single:
        check_output_file(out, force=force, suffix=".safetensors", inputs=[*sources, folder], nbytes=plan.nbytes)
    else:
        check_output(out, force=force, inputs=[*sources, folder], nbytes=plan.nbytes)
    notes = [*(note for item in placed for note in item.adapter.notes), *plan.target.notes]
    notes += [] if choice is None else [choice.note]
    notes += quantization_notes(plan.target.checkpoint, quantized)
    run = None
    if rounding == "feedback" and data is not None:
        sizes = {"samples": samples or SAMPLES.fallback, "length": SEQUENCE_LENGTH.fallback}
        run = feedback_run(plan, placed[0], Path(data), **sizes, quiet=quiet)
    recompute = (scales or SCALES.fallback) == "recompute"
    if min_survival is not None:
        groups = None if run is None else run.groups(plan)
        tried = write_weights(plan, None, groups=groups, recompute=recompute, quiet=quiet)
        lost = _below(tried, min_survival)
        if lost:
            named = {*plan.target.lifted, *(name.removesuffix(".weight") for name in lost)}
            plan = plan_merge(keep_codes(as_placed, rewrite=True, lift=named.__contains__), **shapes)
            notes.append(_lifted_note(lost, min_survival))
    signatures |= plan.target.checkpoint.signatures
    if dry_run:
        place = TemporaryDirectory(prefix="mapconv-")
    else:
        place = staged_file(out, folder.name) if single else staged_folder(out, force=force)
    with place as name, unchanged(signatures):
        staging = Path(name)
        groups = None if run is None else run.groups(plan)
        merged = write_weights(plan, None if dry_run else staging, groups=groups, recompute=recompute, quiet=quiet)
        if not force:
            _check_base(placed, merged)
        notes += write_companions(plan, sources[0], staging, dtype, copied=in_codes)
        notes += [*([] if run is None else run.notes), *_advice(merged, rounding), *_saturation(merged)]
        record = merge_record(placed, weights) | {"survival": survival_record(merged)}
        record["rounding"] = {"method": rounding, "data": None if run is None else run.record}
        if plan.target.encoded:
            kept = {"kept": len(plan.target.encoded), "scales": scales or SCALES.fallback}
            record["quantized"] = kept | {"lifted": list(plan.target.lifted)}
        if choice is not None:
            record["base_values"] = choice.record
        if not single:
            write_file(staging / MERGE_RECORD, json.dumps(record, indent=2) + "\n")
    return MergeResult(
        out=out,
        base=folder,
        method=" + ".join(item.adapter.method for item in placed),
        files=tuple(file.name for file in plan.files),
        tensors=sum(len(file.tensors) for file in plan.files),
        nbytes=plan.nbytes,
        merged=merged,
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        notes=tuple(notes),
    )


def _advice(merged: Sequence[MergedTensor], rounding: Rounding) -> list[str]:
    """One line on what helps, where less of the update survives than a user would expect."""
    damaged = [item for item in merged if item.survival.projection < DAMAGED]
    if not damaged:
        return []
    worst = min(damaged, key=lambda item: item.survival.projection)
    in_codes = worst.dtype not in ITEM_SIZES
    helps = "--lift or --quantized dequantize keeps it in 16 bits" if in_codes else "--dtype float32 keeps all of it"
    helps += "" if rounding == "feedback" else ", --rounding feedback --data FILE more of what the layers put out"
    return [
        f"less than {DAMAGED:g} of the update survives rounding to {worst.dtype} in {counted(len(damaged), 'tensor')} "
        f"(least: {worst.survival.projection:.2f} in {worst.tensor}): {helps}"
    ]


def _below(merged: Sequence[MergedTensor], least: float) -> list[str]:
    """The weights in codes of which less survives, from the worst on."""
    found = [item for item in merged if item.dtype not in ITEM_SIZES and item.survival.projection < least]
    return [item.tensor for item in sorted(found, key=lambda item: item.survival.projection)]


def _lifted_note(lost: Sequence[str], least: float) -> str:
    more = "" if len(lost) == 1 else f" and {len(lost) - 1} more"
    return (
        f"less than {least:g} of the update would survive in {lost[0]}{more}, so {counted(len(lost), 'module')} left "
        "the codes for 16 bits"
    )


def _saturation(merged: Sequence[MergedTensor]) -> list[str]:
    """How many values of merged weights lie beyond what their codes can stand for."""
    count = sum(item.saturated for item in merged)
    if not count:
        return []
    worst = max(merged, key=lambda item: item.saturated)
    tensors = counted(sum(item.saturated > 0 for item in merged), "tensor")
    return [
        f"{counted(count, 'value')} of {tensors} lie beyond the largest that {worst.dtype} reaches with its scales "
        f"(most: {worst.saturated:,} in {worst.tensor})"
    ]


def quantization_notes(checkpoint: Checkpoint, quantized: Quantized = "dequantize") -> list[str]:
    """What the base is quantized as, and what becomes of that; nothing for a plain base."""
    found = ", ".join(f"{counted(count, 'weight')} as {label}" for label, count in storages(checkpoint).items())
    what = {
        "dequantize": "which are written as the values that the codes stand for",
        "copy": "which are copied as they are",
        "keep": "which are copied as they are, or merged and written in the same storage",
    }[quantized]
    return [f"{shown(checkpoint.folder)} is quantized ({found}), {what}"] if found else []


def _check_base(placed: Sequence[PlacedAdapter], merged: Sequence[MergedTensor]) -> None:
    """Refuse a base whose weights are not those that a MAP adapter was made for: fingerprints come with the merge."""
    found: dict[tuple, Fingerprint] = defaultdict(Fingerprint)
    for tensor in merged:
        for identity, part in tensor.base.items():
            found[identity] += part
    for item in (item for adapter in placed for item in adapter.modules):
        if item.scalars is None:
            continue
        fault = base_fault(item.scalars, found[item.identity])
        if fault is not None:
            raise BaseMismatchError(
                f"{item.weight.pieces[0].tensor.file}: {item.weight.name} {fault}: give that base with --base, or "
                "accept this one with --force."
            )
