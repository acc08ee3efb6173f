"""What a calibration reads: sequences to train on, others to choose the best state by, and how the model takes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mapconv.checkpoint.sidecars import brings_tokenizer
from mapconv.data import Dataset, Objective, Rows, read_dataset
from mapconv.placement.adapters import PlacedAdapter
from mapconv.runtime.models import load_tokenizer
from mapconv.training.models import target_classes


@dataclass(frozen=True)
class TrainingData:
    """The two parts, and of a classifier its classes and the token that fills its texts."""

    train: Dataset
    held_out: Dataset
    classes: dict[str, int] | None
    padding: int | None


def read_training_data(
    rows: Rows,
    folder: Path,
    source: PlacedAdapter,
    *,
    length: int,
    held_out: int | float | None = None,
    seed: int = 0,
    objective: Objective = "distill",
) -> TrainingData:
    """A file's rows by the tokenizer of the MAP directory ``folder``, or if it brings none by that of the base.

    Raises:
        MapconvError: of the kind that fits: a model that calibration cannot train, or rows that do not suit it.
    """
    classes = target_classes(source.target)
    tokenizer = load_tokenizer(folder if brings_tokenizer(folder) else source.target.tokenizer)
    parts = read_dataset(
        rows, tokenizer, length=length, held_out=held_out, seed=seed, objective=objective, classes=classes
    )
    return TrainingData(*parts, classes, tokenizer.pad_token_id)
