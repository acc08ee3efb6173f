"""Calibrate a MAP folder against its source: train, keep the best, write it, and measure what was written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mapconv.data import Objective
from mapconv.errors import DataError, ResourceError
from mapconv.fidelity.metrics import ModelNumbers
from mapconv.formats.mapdir import MAP_CONFIG_FILE
from mapconv.formats.peft import CONFIG_FILE, WEIGHTS_FILE
from mapconv.metadata.provenance import source_fingerprint
from mapconv.nn import save_adapter
from mapconv.options.commands import CALIBRATE
from mapconv.placement.adapters import PlacedAdapter
from mapconv.runtime.progress import step_bar
from mapconv.training.checkpoints import Checkpoint, every
from mapconv.training.data import TrainingData
from mapconv.training.evaluation import Evaluator
from mapconv.training.loop import Recipe, Trainer
from mapconv.training.models import MAP, SOURCE, WRITTEN, CalibrationModels, Train
from mapconv.training.processes import Processes
from mapconv.training.report import CalibrationReport, calibrated_modules, write_calibrated

#: In parts of ‖W0‖ that a weight moves a step. Found on SmolLM2-135M with a DoRA of rank 16, refitted in weights: 12
#: steps of 2 × 128 tokens took its held-out KL from 2.25e-5 to 1.01e-5 (scalars) and 0.81e-5 (all). At 6e-5 the scalars
#: were at 1.67e-5 after half of the steps, where 2e-5 was at 1.14e-5.
DEFAULT_RATES: dict[Train, float] = {"scalars": 2e-5, "all": 2e-5}
#: Seconds between two checkpoints of a run.
CHECKPOINT_SECONDS = 180.0
WEIGHT_FILES = (CONFIG_FILE, WEIGHTS_FILE, MAP_CONFIG_FILE)


@dataclass(frozen=True)
class CalibrationOptions:
    """What the caller asked for; a learning rate of None is the default of what is trained.

    ``hold_gain`` keeps α as it is, so that a plain LoRA stays one.
    """

    steps: int
    train: Train = CALIBRATE.options["train"].default
    objective: Objective = CALIBRATE.options["objective"].default
    learning_rate: float | None = None
    batch_size: int = CALIBRATE.options["batch_size"].default
    sequence_length: int = CALIBRATE.options["sequence_length"].default
    seed: int = 0
    hold_gain: bool = False

    @property
    def recipe(self) -> Recipe:
        rate = DEFAULT_RATES[self.train] if self.learning_rate is None else self.learning_rate
        return Recipe(
            self.objective,
            self.train,
            self.steps,
            rate,
            self.batch_size,
            self.sequence_length,
            self.seed,
            self.hold_gain,
        )


def calibrate_folder(
    folder: Path,
    source: PlacedAdapter,
    served: PlacedAdapter,
    data: TrainingData,
    options: CalibrationOptions,
    processes: Processes,
    *,
    into: Path | None,
    check_base: bool = True,
    allow_pickle: bool = False,
    checkpoint: Path | None = None,
    resume: bool = False,
    quiet: bool = True,
) -> CalibrationReport | None:
    """Calibrate the MAP folder ``folder`` against its source and write the result's files ``into`` a folder.

    Args:
        folder: a MAP directory; it may be a staging folder.
        source, served: the adapter that it was made from, on the base that it was trained on and on the one that the
            MAP directory is for; often the same.
        data: what to train on, and what to hold out.
        options: of the training.
        processes: this process among those of the run; the first one writes.
        into: where to write; ``folder`` itself to change it in place. Of other processes than the first: None.
        check_base: refuse a base whose norms are not those that the MAP directory records.
        allow_pickle: read the source's weights from a ``.bin`` file.
        checkpoint: where to keep the run's state every few minutes; None: nowhere.
        resume: go on from that state, if there is one.
        quiet: no progress bar.

    Returns:
        The report, in the first process; None in the others.

    Raises:
        MapconvError: of the kind that fits; nothing was written.
    """
    started, recipe = time.perf_counter(), options.recipe
    train, held_out = data.train, data.held_out
    with _enough_memory(processes):
        models = CalibrationModels(
            source,
            served,
            folder,
            train=recipe.train,
            hold_gain=recipe.hold_gain,
            device=processes.device,
            classes=data.classes,
            padding=data.padding,
            check_base=check_base,
            allow_pickle=allow_pickle,
        )
        if recipe.sequence_length > models.longest_text:
            raise DataError(
                f"--sequence-length {recipe.sequence_length} is more than the {models.longest_text} positions of the "
                "model: give a smaller one."
            )
        if processes.device.type == "cuda":
            models.save_memory()
        closed_form = [parameter.detach().clone() for parameter in models.trained]
        evaluator = Evaluator(models, held_out, recipe.objective, recipe.batch_size, causal=data.classes is None)
        trainer = Trainer(recipe, models, train, evaluator, processes)
        run = {name: str(value) for name, value in asdict(recipe).items()}
        run |= {"data": train.fingerprint, "held-out data": held_out.fingerprint}
        run |= {"source": source_fingerprint(source.adapter.path), "MAP folder": source_fingerprint(folder)}
        notes = _train(trainer, checkpoint, run, processes, resume=resume, quiet=quiet)
        if not processes.is_first or into is None:
            return None
        progress = trainer.progress
        best_step, fresh = progress.best_step, into / ".calibrated"
        _write_weights(models, folder, fresh, changed=best_step > 0)
        numbers, positions = _measure(models, evaluator, closed_form, fresh, processes.device)
        if best_step and not _is_better(numbers, recipe.objective):
            notes.append("rounding to the stored dtype cancelled the improvement, so the closed form is kept")
            best_step = 0
            _write_weights(models, folder, fresh, changed=False)
            numbers, positions = _measure(models, evaluator, closed_form, fresh, processes.device)
        if models.has_stacks:
            notes.append("α is held as it was: stock PEFT has no DoRA for stacked parameters, so no other α")
        if best_step and not models.stores_float32:
            notes.append("training needs finer steps than the stored dtype has: the factors are written in float32")
    modules = calibrated_modules(folder, fresh, source, served.target.folder)
    report = CalibrationReport(
        recipe=recipe,
        steps=progress.step,
        best_step=best_step,
        stopped=progress.stopped,
        interrupted=progress.interrupted,
        tokens=progress.tokens,
        trained_parameters=sum(parameter.numel() for parameter in models.trained),
        train_sequences=len(train),
        held_out_sequences=len(held_out),
        held_out_positions=positions,
        history=tuple(progress.history),
        models=numbers,
        modules=modules,
        data={"train": train.fingerprint, "held_out": held_out.fingerprint},
        seconds=time.perf_counter() - started,
        update_sizes=tuple(progress.sizes),
        notes=(*train.notes, *notes),
    )
    write_calibrated(folder, fresh, into, report)
    return report


def _train(
    trainer: Trainer,
    checkpoint: Path | None,
    run: dict[str, str],
    processes: Processes,
    *,
    resume: bool,
    quiet: bool,
) -> list[str]:
    """Run to the end, with checkpoints; returns notes for the user."""
    notes: list[str] = []
    stored = None if checkpoint is None else Checkpoint(checkpoint, run)
    if stored is not None and resume:
        state = stored.load(processes.device)
        if state is None:
            notes.append("there is no checkpoint to resume from: the run began at step 0")
        else:
            trainer.restore(state)
            notes.append(f"resumed after step {trainer.progress.step}")

    def save() -> None:
        if stored is not None and processes.is_first:
            stored.save(trainer.state())

    total, done = trainer.recipe.steps, trainer.progress.step
    with step_bar(total, "calibrating", done=done, quiet=quiet or not processes.is_first) as bar:
        progress = trainer.run(bar, every(CHECKPOINT_SECONDS, save))
    if progress.stopped:
        notes.append(f"{progress.stopped}; the best state, of step {progress.best_step}, is kept")
    if not progress.best_step and not progress.stopped:
        notes.append("no step improved on the closed form, which is kept: more data or a smaller rate may help")
    return notes


def _write_weights(models: CalibrationModels, folder: Path, fresh: Path, *, changed: bool) -> None:
    """Write the adapter's files into a folder of their own; unchanged, they are the very bytes that were read."""
    if changed:
        save_adapter(models.model, fresh, name=MAP, force=True)
        return
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for name in WEIGHT_FILES:
        shutil.copyfile(folder / name, fresh / name)


def _measure(
    models: CalibrationModels, evaluator: Evaluator, closed_form: list[torch.Tensor], fresh: Path, device: torch.device
) -> tuple[dict[str, ModelNumbers], int]:
    """The four models on the held-out data; the calibrated one from the files that were written."""
    with torch.no_grad():
        for parameter, value in zip(models.trained, closed_form, strict=True):
            parameter.copy_(value)
    names = {"base": None, "source": SOURCE, "closed form": MAP, "calibrated": WRITTEN}
    with models.attached(fresh):
        runs = {label: (lambda batch, name=name: models.logits(name, batch)) for label, name in names.items()}
        return evaluator.numbers(runs | {"source": None}, device)


def _is_better(numbers: dict[str, ModelNumbers], objective: Objective) -> bool:
    before, after = numbers["closed form"], numbers["calibrated"]
    if objective == "distill":
        return after.kl < before.kl
    return after.loss is not None and before.loss is not None and after.loss < before.loss


@contextmanager
def _enough_memory(processes: Processes) -> Iterator[None]:
    """Say in one sentence which knob to turn when memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        where = "the GPU" if processes.device.type == "cuda" else "this machine"
        other = ", or train on the CPU with --device cpu" if processes.device.type == "cuda" else ""
        raise ResourceError(
            f"{where} does not have enough memory for this training: use a smaller --batch-size or "
            f"--sequence-length{other}."
        ) from None
