"""What a calibration reads: sequences to train on, others to choose the best state by, and how the model takes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mapconv.checkpoint.sidecars import brings_tokenizer
from mapconv.data import Dataset, Objective, Rows, read_dataset
from mapconv.data.reading import HELD_OUT_SEQUENCES
from mapconv.placement.adapters import PlacedAdapter
from mapconv.runtime.models import load_tokenizer
from mapconv.training.models import target_classes

#: A distillation holds out a sequence for so many that it trains on, where nobody says how many. A held-out sequence
#: takes 16 forward passes in a run (of two models at six evaluations, of four at the end), one of a step four: on
#: SmolLM2-135M, 3 sequences are 15 % of a run of 25 steps, and 8 of one of 100 steps 10 %.
PER_HELD_OUT, FEWEST = 48, 3


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
    trained: int | None = None,
    seed: int = 0,
    objective: Objective = "distill",
) -> TrainingData:
    """A file's rows by the tokenizer of the MAP directory ``folder``, or if it brings none by that of the base.

    Args:
        rows, folder, source: the file's rows, the MAP directory, and what it is trained towards.
        length, held_out, seed, objective: as of ``mapconv.data.read_dataset``.
        trained: how many sequences the run will train on, in all its steps.

    Raises:
        MapconvError: of the kind that fits: a model that calibration cannot train, or rows that do not suit it.
    """
    classes = target_classes(source.target)
    tokenizer = load_tokenizer(folder if brings_tokenizer(folder) else source.target.tokenizer)
    # A sorted text is one position, of which a few say nothing.
    most = HELD_OUT_SEQUENCES
    if trained is not None and classes is None and objective == "distill":
        most = min(most, max(FEWEST, trained // PER_HELD_OUT))
    settings = {"held_out": held_out, "most_held_out": most, "seed": seed, "objective": objective}
    parts = read_dataset(rows, tokenizer, length=length, classes=classes, **settings)
    return TrainingData(*parts, classes, tokenizer.pad_token_id)
