"""Train a MAP adapter towards its source, or on a task, and write the best state that held-out data shows."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mapconv.adapter import Adapter, MapModule
from mapconv.checkpoint.sidecars import copy_tokenizer
from mapconv.checkpoint.staging import check_output, remove_file, staged_folder
from mapconv.commands.outputs import output_beside
from mapconv.data import Objective, read_rows
from mapconv.errors import AdapterError, OutputError, UnsupportedError
from mapconv.fidelity.metrics import ModelNumbers
from mapconv.formats import read_adapter
from mapconv.formats.mapdir import MAP_CONFIG_FILE
from mapconv.hub.locate import locate_adapter
from mapconv.metadata.card import CARD_FILE, PLOT_FILE, REPORT_FILE
from mapconv.metadata.provenance import source_fingerprint
from mapconv.options.commands import CALIBRATE
from mapconv.placement.adapters import place_adapter
from mapconv.placement.base_check import accepted_note
from mapconv.refit.norms import strange_weights
from mapconv.training.calibration import WEIGHT_FILES, CalibrationOptions, CalibrationReport, calibrate_folder
from mapconv.training.checkpoints import checkpoint_path
from mapconv.training.data import read_training_data
from mapconv.training.models import Train
from mapconv.training.processes import joined

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrateResult:
    """What a calibration wrote. ``report`` has its numbers, all measured on files as they were read or written."""

    out: Path
    adapter: Path
    source: Path
    base: Path
    report: CalibrationReport

    @property
    def models(self) -> dict[str, ModelNumbers]:
        return self.report.models

    @property
    def modules(self) -> tuple[MapModule, ...]:
        return self.report.modules

    def to_dict(self) -> dict[str, Any]:
        table = {name: str(getattr(self, name)) for name in ("out", "adapter", "source", "base")}
        report = self.report.record() | {
            name: getattr(self.report, name) for name in ("seconds", "interrupted", "notes")
        }
        return table | report | {"modules": [module.to_dict() for module in self.modules]}


@CALIBRATE.checks
def calibrate(
    adapter: str | Path,
    *,
    against: str | Path,
    data: str | Path,
    base: str | Path | None = None,
    out: str | Path | None = None,
    steps: int = 50,
    train: Train = "scalars",
    objective: Objective = "distill",
    learning_rate: float | None = None,
    batch_size: int = 4,
    sequence_length: int = 256,
    held_out: int | float | None = None,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    allow_pickle: bool = False,
    force: bool = False,
    quiet: bool = True,
) -> CalibrateResult | None:
    """Train the scalars of a MAP directory, or all of it, and write the state that is best on held-out data.

    The closed form that the run starts from takes part: the result is never worse than it, on the held-out data.

    Args:
        adapter: the MAP directory.
        against: the LoRA or DoRA adapter that it was made from.
        data: a text file, or ``.jsonl`` or ``.parquet`` with text, chats or labelled texts (``mapconv.data``).
        base: the base model's folder or Hub id; None takes it from the source's configuration.
        out: the folder to write; None: ``<adapter>-calibrated`` beside the adapter.
        steps: optimizer steps.
        train: ``scalars``: α and β of every weight; ``all``: its factors as well.
        objective: ``distill``: KL(source ‖ MAP), which needs no labels; ``task``: the data's own loss.
        learning_rate: the highest; None: the default for what is trained.
        batch_size: sequences in a step.
        sequence_length: tokens in a sequence.
        held_out: a number of sequences, or below 1 a share of the data; None: a tenth, at most 32 sequences,
            and of a distillation one for 48 sequences of its steps, at least 3.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: of the held-out choice and of the order of the data.
        resume: go on from the checkpoint of a run of the same settings that was cut off.
        allow_pickle: read the source's weights from a ``.bin`` file.
        force: replace ``out``, which may be ``adapter`` itself; start again where a checkpoint was left; and accept
            another source or base than the MAP directory records.
        quiet: no progress bar.

    Returns:
        The result. Of several processes (``accelerate launch``) the first one's; None in the others.

    Raises:
        MapconvError: of the kind that fits; ``out`` is then as it was.
        ValueError: an option out of its range.
    """
    options = CalibrationOptions(steps, train, objective, learning_rate, batch_size, sequence_length, seed)
    adapter_path, source_path = locate_adapter(adapter), locate_adapter(against, allow_pickle=allow_pickle)
    out = output_beside(adapter, "calibrated") if out is None else Path(out)
    rows = read_rows(data)
    map_adapter = read_adapter(adapter_path)
    source = place_adapter(source_path, base, allow_pickle=allow_pickle)
    notes = _check_pair(map_adapter, source.adapter, force=force)
    if force:  # else another base is refused before the first step
        strange = strange_weights(place_adapter(adapter_path, source.target.folder))
        notes += accepted_note([f"{item.weight.name} {fault}" for item, fault in strange])
    in_place = out.resolve() == adapter_path.resolve()
    inputs = [source_path, source.target.folder] + ([] if in_place else [adapter_path])
    check_output(out, force=force, inputs=inputs, nbytes=2 * map_adapter.nbytes, carries_over=in_place)
    checkpoint = checkpoint_path(out)
    if checkpoint.exists() and not (resume or force):
        raise OutputError(
            f"{checkpoint} is the state of an interrupted run: pass --resume to continue, or --force to start again."
        )
    arguments = {
        "check_base": not force,
        "allow_pickle": allow_pickle,
        "checkpoint": checkpoint,
        "resume": resume,
        "quiet": quiet,
    }
    log.info("read %s; training starts from %s", data, adapter_path)
    with joined(device) as processes:
        sequences = read_training_data(
            rows,
            adapter_path,
            source,
            length=sequence_length,
            held_out=held_out,
            trained=steps * batch_size,
            seed=seed,
            objective=objective,
        )
        training = adapter_path, source, source, sequences, options, processes
        if not processes.is_first:
            calibrate_folder(*training, into=None, **arguments)
            return None
        with staged_folder(out, force=force) as staging:
            _copy_sidecars(adapter_path, staging, all_files=in_place)
            report = calibrate_folder(*training, into=staging, **arguments)
    assert report is not None  # this is the first process
    remove_file(checkpoint)
    report = replace(report, notes=(*notes, *report.notes))
    return CalibrateResult(out, adapter_path, source_path, source.target.folder, report)


def _copy_sidecars(adapter: Path, staging: Path, *, all_files: bool) -> None:
    """Copy the tokenizer and the card; in place, all that lies there, but for what was made of the old weights."""
    if all_files:
        old = shutil.ignore_patterns(*WEIGHT_FILES, REPORT_FILE, PLOT_FILE)
        # Links stay links: what they lead to is none of the result's.
        shutil.copytree(adapter, staging, symlinks=True, dirs_exist_ok=True, ignore=old)
        return
    copy_tokenizer(adapter, staging)
    if (adapter / CARD_FILE).is_file():
        shutil.copyfile(adapter / CARD_FILE, staging / CARD_FILE)


def _check_pair(adapter: Adapter, source: Adapter, *, force: bool) -> list[str]:
    """Refuse what is not a MAP directory, or was made from another adapter than the source; returns what was accepted
    with ``force``."""
    if adapter.method != "MAP":
        raise AdapterError(
            f"{adapter.path} is not a MAP adapter ({adapter.method}): convert it with `mapconv upgrade` first."
        )
    if (adapter.map_config or {}).get("rebase") is not None:
        raise UnsupportedError(
            f"{adapter.path} was rebased, and its source's outputs are those on another base: train it as it is made, "
            "with `mapconv rebase --calibrate STEPS`."
        )
    if source.method == "MAP":
        raise AdapterError(
            f"{source.path} is a MAP adapter: --against takes the LoRA or DoRA that {adapter.path} was made from."
        )
    recorded = ((adapter.map_config or {}).get("source") or {}).get("fingerprint")
    fault = f"{adapter.path / MAP_CONFIG_FILE} was made from another adapter than {source.path}"
    is_other = recorded != source_fingerprint(source.path)
    if is_other and not force:
        raise AdapterError(f"{fault}: give that one with --against, or accept this one with --force.")
    missing = {m.path for m in adapter.map_modules} ^ {m.path for m in source.modules}
    if missing:
        raise AdapterError(
            f"{adapter.path} and {source.path} adapt different modules ({min(missing)} for one): they do not belong "
            "together."
        )
    return [f"accepted with --force: {fault}"] if is_other else []
