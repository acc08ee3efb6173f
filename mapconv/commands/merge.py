"""Merge adapters into their base: one pass over the checkpoint, written whole or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mapconv.checkpoint.filenames import MERGE_RECORD
from mapconv.checkpoint.staging import check_output, check_output_file, staged_file, staged_folder, write_file
from mapconv.checkpoint.unchanged import unchanged
from mapconv.commands.base_values import MEASURED_SAMPLES, BaseValues, choose_base
from mapconv.commands.feedback import feedback_run
from mapconv.commands.merge_outcome import MergeResult, advice, below, check_base, lifted_note, saturation
from mapconv.commands.merge_preparation import MergeWish, Quantized, Rounding, Scales, prepare
from mapconv.commands.merge_to_hub import merge_to_hub
from mapconv.hub.locate import locate_adapter
from mapconv.merging.companions import write_companions
from mapconv.merging.writer import write_weights
from mapconv.options.merging import MERGE
from mapconv.options.shared import MESSAGE, SAMPLES, SEQUENCE_LENGTH
from mapconv.publishing.upload import Destination
from mapconv.refit.plan import Dtype
from mapconv.spelling import Axis, Norm, Rescaling


@MERGE.checks
def merge(
    adapters: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    push_to: str | None = None,
    work_dir: str | Path | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    license: str | None = None,
    base_id: str | None = None,
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

    With ``push_to`` in place of ``out``, the merged model goes to the Hub file by file: this disk has at most two of
    its weights files at a time, and a base on the Hub is read from there. One commit in the end has all of it.

    Args:
        adapters: the adapter's folder or Hub reference (``owner/name[@revision][:subfolder]``), or several: updates of
            LoRA and MAP adapters on one weight add up.
        out: the folder to write; it appears whole or not at all.
        push_to: ``owner/name`` on the Hub, created if it does not exist.
        work_dir: a folder with room for two weights files, in which the same call goes on after an interruption; None:
            the assets cache of the Hub's client.
        private, revision, message, license, base_id: as of ``push``, with ``push_to``.
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
        MapconvError: of the kind that fits; ``out`` then does not exist, and nothing is visible on the Hub but for a
            repository that was just created.
        ValueError: an option out of its range, another number of weights than of adapters,
            or a dtype for weights that are copied in codes.
    """
    started = time.perf_counter()
    assert not isinstance(max_shard_size, str)  # the option has made bytes of it
    named = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    sources = [locate_adapter(adapter, allow_pickle=allow_pickle) for adapter in named]
    dora = Rescaling(dora_axis, dora_norm)
    wish = MergeWish(sources, weights, dtype, max_shard_size, quantized, scales, lift, dora, allow_pickle)
    if push_to is not None:
        to = Destination(push_to, private, revision, False, message or MESSAGE.fallback)
        place = None if work_dir is None else Path(work_dir)
        place_of = {"work_dir": place, "license_": license, "base_id": base_id}
        return merge_to_hub(wish, base, to, **place_of, force=force, dry_run=dry_run, quiet=quiet)
    assert out is not None  # one of the two, by the rules
    out = Path(out)
    choice = None
    if base_values is not None:
        measured = {"original": original, "data": data, "samples": samples or MEASURED_SAMPLES}
        choice = choose_base(sources[0], base, base_values, **measured, allow_pickle=allow_pickle, quiet=quiet)
        base = choice.base
    # Feedback runs the model.
    prepared = prepare(wish, base, fetch="whole" if rounding == "feedback" else "files")
    plan = prepared.plan
    folder = plan.target.folder
    single = plan.target.checkpoint.is_file
    if single:
        check_output_file(out, force=force, suffix=".safetensors", inputs=[*sources, folder], nbytes=plan.nbytes)
    else:
        check_output(out, force=force, inputs=[*sources, folder], nbytes=plan.nbytes)
    notes = prepared.notes + ([] if choice is None else [choice.note])
    run = None
    if rounding == "feedback" and data is not None:
        sizes = {"samples": samples or SAMPLES.fallback, "length": SEQUENCE_LENGTH.fallback}
        run = feedback_run(plan, prepared.placed[0], Path(data), **sizes, quiet=quiet)
    if min_survival is not None:
        groups = None if run is None else run.groups(plan)
        tried = write_weights(plan, None, groups=groups, recompute=wish.recompute, quiet=quiet)
        lost = below(tried, min_survival)
        if lost:
            prepared = prepared.lifting([name.removesuffix(".weight") for name in lost])
            plan = prepared.plan
            notes.append(lifted_note(lost, min_survival))
    if dry_run:
        place = TemporaryDirectory(prefix="mapconv-")
    else:
        place = staged_file(out, folder.name) if single else staged_folder(out, force=force)
    with place as name, unchanged(prepared.signatures):
        staging = Path(name)
        groups = None if run is None else run.groups(plan)
        merged = write_weights(plan, None if dry_run else staging, groups=groups, recompute=wish.recompute, quiet=quiet)
        notes += check_base(prepared.placed, merged, force=force)
        notes += write_companions(plan, sources[0], staging, dtype, copied=wish.in_codes)
        notes += [*([] if run is None else run.notes), *advice(merged, rounding), *saturation(merged)]
        record = prepared.record(merged, rounding, None if run is None else run.record)
        if choice is not None:
            record["base_values"] = choice.record
        if not single:
            write_file(staging / MERGE_RECORD, json.dumps(record, indent=2) + "\n")
    facts = prepared.facts
    if single:
        facts["files"] = (out.name,)
    return MergeResult(
        **facts,
        out=out,
        merged=merged,
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
        notes=tuple(notes),
    )
